// Products with integer panels. Integer sums are exact, whatever their order; float sums go group by group in order, so
// that a row's result is the same in every tile, block, batch and thread.
//
// A tile is up to TILE_ROWS rows (terms of rows, see linear_int.hpp) times the PANEL outputs of a panel. With more rows
// than that a panel is taken in blocks of BLOCK_BYTES, which stay in the first-level cache while all tiles use them;
// meanwhile each tile fetches its share of the next block. Totals wait in memory between the blocks.
#include "../linear_int.hpp"
#include "activations.hpp"
#include "leaves.hpp"
#include "simd.hpp"

#if defined(__SSE2__) && !defined(__AVX__)
#include <emmintrin.h>
#endif

namespace pando {
namespace PANDO_LEVEL {

namespace {

#if PANDO_VECTOR_BYTES == 64
constexpr int TILE_VECTORS = 4, TILE_ROWS = 6, TILE_ROWS_NIBBLES = 5;
#else
constexpr int TILE_VECTORS = 2, TILE_ROWS = 3, TILE_ROWS_NIBBLES = 3;
#endif
constexpr int MAX_TILE_ROWS = 6;
constexpr int64_t BLOCK_BYTES = 16 << 10;
// How far ahead a single tile fetches its weights.
constexpr int64_t FETCH_AHEAD = 4 << 10;

typedef int8_t vb __attribute__((vector_size(W)));

inline vi splat_int(int32_t x) { return x - vi{}; }

inline vu load_bytes(const char* p) {
    vu x;
    memcpy(&x, p, sizeof x);
    return x;
}

inline int32_t load_word(const int8_t* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

// ---- acc + four unsigned bytes times four signed bytes, per lane of 32 bits ----

#if defined(__AVX512VNNI__) && PANDO_VECTOR_BYTES == 64
struct Quads {
    vi word;
};
inline Quads broadcast(int32_t word) { return {splat_int(word)}; }
inline vi dot(vi acc, vu bytes, Quads quads) {
    return reinterpret_cast<vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(bytes),
                                                    reinterpret_cast<__m512i>(quads.word)));
}
#elif defined(__SSE2__)
typedef int16_t vs __attribute__((vector_size(PANDO_VECTOR_BYTES)));
inline vi multiply_add(vu a, vs b) {
#if PANDO_VECTOR_BYTES == 64
    return reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif PANDO_VECTOR_BYTES == 32
    return reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
    return reinterpret_cast<vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
}
// The instruction for bytes saturates its sums; widened to 16 bits they are exact.
struct Quads {
    vs even, odd;
};
inline Quads broadcast(int32_t word) {
    const vs both = reinterpret_cast<vs>(splat_int(word));
    return {both << 8 >> 8, both >> 8};
}
inline vi dot(vi acc, vu bytes, Quads quads) {
    acc += multiply_add(bytes & 0x00ff00ffu, quads.even);
    return acc + multiply_add(bytes >> 8 & 0x00ff00ffu, quads.odd);
}
#else
struct Quads {
    vi byte[4];
};
inline Quads broadcast(int32_t word) {
    const vi all = splat_int(word);
    return {{all << 24 >> 24, all << 16 >> 24, all << 8 >> 24, all >> 24}};
}
inline vi dot(vi acc, vu bytes, const Quads& quads) {
    for (int i = 0; i < 4; ++i) acc += reinterpret_cast<vi>(bytes >> (8 * i) & 0xffu) * quads.byte[i];
    return acc;
}
#endif

// ---- tiles ----

struct Tile {
    const char* weights;                 // of the block
    const int8_t* values[MAX_TILE_ROWS]; // of each row: its first input in the block
    const GroupSums* sums[MAX_TILE_ROWS];
    char* totals; // [rows][PANEL] int32 or float
    int64_t groups, group_steps;
    bool first; // block of its panel
    const char* fetch;
    int64_t fetch_lines; // per step
};

// I8: int32 totals. Grouped: float totals, group by group.
template <bool GROUPED, bool NIBBLES, bool OFFSETS>
struct Form {
    static constexpr bool grouped = GROUPED, nibbles = NIBBLES, offsets = OFFSETS;
    static constexpr int64_t head_bytes = !GROUPED ? 0 : PANEL * (OFFSETS ? 4 : 2);
    static constexpr int64_t step_inputs = NIBBLES ? 8 : 4;
    static constexpr int tile_rows = NIBBLES ? TILE_ROWS_NIBBLES : TILE_ROWS;
};

template <int R>
inline void accumulate(vi (&acc)[R][TILE_VECTORS], const vu (&bytes)[TILE_VECTORS], const int8_t* const (&values)[R],
                       int64_t at) {
    for (int r = 0; r < R; ++r) {
        const Quads quads = broadcast(load_word(values[r] + at));
        for (int c = 0; c < TILE_VECTORS; ++c) acc[r][c] = dot(acc[r][c], bytes[c], quads);
    }
}

// The outputs of TILE_VECTORS vectors from `column` on.
template <class F, int R>
inline void multiply_columns(const Tile& tile, int64_t column) {
    constexpr int C = TILE_VECTORS;
    constexpr bool in_registers = F::grouped && R * C <= 8;
    const int8_t* values[R];
    char* totals[R];
    for (int r = 0; r < R; ++r) {
        values[r] = tile.values[r];
        totals[r] = tile.totals + (r * PANEL + column) * 4;
    }
    const char* weights = tile.weights;
    const char* fetch = tile.fetch;
    vf running[R][C];
    if constexpr (in_registers) {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c)
                running[r][c] = tile.first ? vf{} : load(reinterpret_cast<const float*>(totals[r]) + c * W);
        }
    }
    for (int64_t group = 0; group < tile.groups; ++group) {
        const char* head = weights;
        weights += F::head_bytes + column * 4;
        if constexpr (F::grouped) {
            for (int64_t line = 0; line < F::head_bytes; line += 64) __builtin_prefetch(head + FETCH_AHEAD + line);
        }
        vi acc[R][C];
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) {
                if (F::grouped || tile.first) {
                    acc[r][c] = splat_int(tile.sums[r][group].start);
                } else {
                    memcpy(&acc[r][c], totals[r] + c * sizeof(vi), sizeof(vi));
                }
            }
        }
        for (int64_t step = 0; step < tile.group_steps; ++step, weights += STEP_BYTES) {
            for (int64_t line = 0; line < tile.fetch_lines; ++line, fetch += 64) __builtin_prefetch(fetch);
            const int64_t at = (group * tile.group_steps + step) * F::step_inputs;
            vu bytes[C];
            for (int c = 0; c < C; ++c) bytes[c] = load_bytes(weights + c * sizeof(vu));
            if constexpr (F::nibbles) {
                vu low[C];
                for (int c = 0; c < C; ++c) low[c] = bytes[c] & 0x0f0f0f0fu;
                accumulate(acc, low, values, at);
                for (int c = 0; c < C; ++c) bytes[c] = bytes[c] >> 4 & 0x0f0f0f0fu;
                accumulate(acc, bytes, values, at + 4);
            } else {
                accumulate(acc, bytes, values, at);
            }
        }
        weights -= column * 4;
        if constexpr (!F::grouped) {
            for (int r = 0; r < R; ++r) {
                for (int c = 0; c < C; ++c) memcpy(totals[r] + c * sizeof(vi), &acc[r][c], sizeof(vi));
            }
        } else {
            const f16* scales = reinterpret_cast<const f16*>(head) + column;
            for (int c = 0; c < C; ++c) {
                const vf scale = load(scales + c * W);
                vf offset{};
                if constexpr (F::offsets) offset = load(scales + PANEL + c * W);
                for (int r = 0; r < R; ++r) {
                    const GroupSums& sums = tile.sums[r][group];
                    float* total = reinterpret_cast<float*>(totals[r]) + c * W;
                    vf value;
                    if constexpr (in_registers) {
                        value = running[r][c];
                    } else {
                        value = tile.first && group == 0 ? vf{} : load(total);
                    }
                    const vf product = __builtin_convertvector(acc[r][c], vf) * scale;
                    value += product * sums.scale;
                    if constexpr (F::offsets) value += offset * sums.sum;
                    if constexpr (in_registers) {
                        running[r][c] = value;
                    } else {
                        store(total, value);
                    }
                }
            }
        }
    }
    if constexpr (in_registers) {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) store(reinterpret_cast<float*>(totals[r]) + c * W, running[r][c]);
        }
    }
}

template <class F, int R>
void multiply_tile(const Tile& tile) {
    for (int64_t column = 0; column < PANEL; column += TILE_VECTORS * W) multiply_columns<F, R>(tile, column);
}

template <class F>
void multiply_rows(const Tile& tile, int64_t rows) {
    switch (rows) {
    case 1: return multiply_tile<F, 1>(tile);
    case 2: return multiply_tile<F, 2>(tile);
    case 3: return multiply_tile<F, 3>(tile);
#if PANDO_VECTOR_BYTES == 64
    case 4: return multiply_tile<F, 4>(tile);
    case 5: return multiply_tile<F, 5>(tile);
    case 6:
        if constexpr (F::tile_rows >= 6) return multiply_tile<F, 6>(tile);
        break;
#endif
    }
}

// ---- the results of a panel ----

struct Finish {
    const PackedWeight* weight;
    const char* totals; // [rows * terms][PANEL]
    int64_t rows, terms;
    const GroupSums* const* sums; // of each row and term
    int64_t panel;
    char* out; // of the first row
    int64_t out_stride;
    bool accumulate;
};

inline vf one_result(const Finish& f, int64_t row, int64_t at) {
    vf value{};
    for (int64_t term = 0; term < f.terms; ++term) {
        const int64_t i = row * f.terms + term;
        const char* total = f.totals + (i * PANEL + at) * 4;
        if (f.weight->kind == WeightKind::i8) {
            vi sum;
            memcpy(&sum, total, sizeof sum);
            value += __builtin_convertvector(sum, vf) * f.sums[i][0].scale;
        } else {
            value += load(reinterpret_cast<const float*>(total));
        }
    }
    value *= load(f.weight->scale + f.panel * PANEL + at);
    return f.weight->bias == nullptr ? value : value + load(f.weight->bias + f.panel * PANEL + at);
}

template <class T, class Value>
inline void write_row(const Finish& f, int64_t row, int64_t column, int64_t count, const Value& value) {
    T* out = reinterpret_cast<T*>(f.out) + row * f.out_stride + column;
    const bool accumulate = f.accumulate;
    for_row(
        count,
        [&](int64_t i) {
            vf result = value(i);
            if (accumulate) result += load(out + i);
            store(out + i, result);
        },
        [&](int64_t i, int64_t rest) {
            vf result = value(i);
            if (accumulate) result += load_first(out + i, rest);
            store_first(out + i, result, rest);
        });
}

struct Plain {};

template <class T, class Kind>
void finish_rows(const Finish& f) {
    const int64_t each = columns_per_panel(*f.weight), column = f.panel * each;
    const int64_t count = smaller(each, num_columns(*f.weight) - column);
    for (int64_t row = 0; row < f.rows; ++row) {
        write_row<T>(f, row, column, count, [&](int64_t i) {
            if constexpr (__is_same(Kind, Plain)) {
                return one_result(f, row, i);
            } else {
                return Kind::of(one_result(f, row, i), one_result(f, row, PANEL / 2 + i));
            }
        });
    }
}

template <class T>
void finish(const Finish& f) {
    if (f.weight->activation == NO_ACTIVATION) return finish_rows<T, Plain>(f);
    switch (static_cast<Activation>(f.weight->activation)) {
    case Activation::silu: return finish_rows<T, Silu>(f);
    case Activation::gelu_tanh: return finish_rows<T, GeluTanh>(f);
    case Activation::gelu: return finish_rows<T, Gelu>(f);
    case Activation::relu2: return finish_rows<T, Relu2>(f);
    case Activation::swiglu_oai: return finish_rows<T, SwigluOai>(f);
    }
}

void finish_panel(const Finish& f, DType dtype) {
    switch (dtype) {
    case DType::f32: return finish<float>(f);
    case DType::bf16: return finish<bf16>(f);
    case DType::f16: return finish<f16>(f);
    }
}

// ---- panels ----

int64_t num_terms(const PackedWeight& w) { return w.activation_bits == 8 ? 1 : 2; }

int64_t sums_at(const PackedWeight& w, const IntShape& shape) {
    return round_up(num_terms(w) * shape.padded_inputs, 4);
}

// A panel's blocks: whole groups, or for i8 steps of its only one.
struct Blocks {
    int64_t units, per_block, unit_bytes, unit_inputs;
};

template <class F>
Blocks blocks_of(const IntShape& shape, bool single_tile) {
    Blocks blocks;
    blocks.units = F::grouped ? shape.groups : shape.group_steps;
    blocks.unit_bytes = F::grouped ? shape.group_bytes : STEP_BYTES;
    blocks.unit_inputs = F::grouped ? shape.padded_group : shape.step_inputs;
    blocks.per_block = single_tile ? blocks.units : larger(1, BLOCK_BYTES / blocks.unit_bytes);
    return blocks;
}

struct RowTerms {
    const int8_t** values; // of each row and term
    const GroupSums** sums;
    char* totals;
    int64_t count;
};

template <class F>
void multiply_panel(const IntShape& shape, const char* panel, const RowTerms& rows) {
    const int64_t num_tiles = (rows.count + F::tile_rows - 1) / F::tile_rows;
    const Blocks blocks = blocks_of<F>(shape, num_tiles == 1);
    Tile tile;
    for (int64_t unit = 0; unit < blocks.units; unit += blocks.per_block) {
        const int64_t units = smaller(blocks.per_block, blocks.units - unit);
        const int64_t steps = F::grouped ? units * shape.group_steps : units;
        tile.weights = panel + unit * blocks.unit_bytes;
        tile.groups = F::grouped ? units : 1;
        tile.group_steps = F::grouped ? shape.group_steps : units;
        tile.first = unit == 0;
        const int64_t lines = units * blocks.unit_bytes / 64;
        tile.fetch_lines = (lines + steps * num_tiles - 1) / (steps * num_tiles);
        if (num_tiles == 1) tile.fetch_lines = 4;
        for (int64_t i = 0; i < num_tiles; ++i) {
            const int64_t begin = rows.count * i / num_tiles, end = rows.count * (i + 1) / num_tiles;
            for (int64_t row = begin; row < end; ++row) {
                tile.values[row - begin] = rows.values[row] + unit * blocks.unit_inputs;
                tile.sums[row - begin] = rows.sums[row] + (F::grouped ? unit : 0);
            }
            tile.totals = rows.totals + begin * PANEL * 4;
            tile.fetch = tile.weights + (num_tiles == 1 ? FETCH_AHEAD
                                                       : units * blocks.unit_bytes +
                                                             64 * smaller(lines, i * steps * tile.fetch_lines));
            multiply_rows<F>(tile, end - begin);
        }
    }
}

void (*panel_product(const PackedWeight& w))(const IntShape&, const char*, const RowTerms&) {
    switch (w.kind) {
    case WeightKind::i8: return multiply_panel<Form<false, false, false>>;
    case WeightKind::g8:
        return w.has_offsets ? multiply_panel<Form<true, false, true>> : multiply_panel<Form<true, false, false>>;
    default: return w.has_offsets ? multiply_panel<Form<true, true, true>> : multiply_panel<Form<true, true, false>>;
    }
}

// ---- rounding of activations ----

// The largest magnitude of a row's elements, as bits: infinities and NaN are above all numbers.
template <class T>
uint32_t largest_bits(const T* x, int64_t n) {
    vi largest{};
    const auto include = [&](vf v) {
        const vi magnitude = reinterpret_cast<vi>(bits_of(v) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    };
    for_row(
        n, [&](int64_t i) { include(load(x + i)); }, [&](int64_t i, int64_t rest) { include(load_first(x + i, rest)); });
    int32_t best = 0;
    for (int i = 0; i < W; ++i) best = largest[i] > best ? largest[i] : best;
    return static_cast<uint32_t>(best);
}

inline int32_t sum_lanes(vi x) {
    int32_t total = 0;
    for (int i = 0; i < W; ++i) total += x[i];
    return total;
}

// Rounded to integers, ties to even; |x| < 2^22.
inline vi to_integers(vf x) { return reinterpret_cast<vi>(bits_of(x + 0x1.8p23f)) - 0x4b400000; }

inline void store_first(int8_t* p, vi x, int64_t n) {
    const vb bytes = __builtin_convertvector(x, vb);
    memcpy(p, &bytes, static_cast<size_t>(n));
}

// Values and their sums of one group of n inputs; each term `stride` bytes after the one before.
template <class T, int TERMS>
void round_group(const T* x, int64_t n, float divisor, int8_t* values, int64_t stride, int32_t (&totals)[2]) {
    vi sum[2] = {};
    const auto put = [&](vi q, int64_t i, int64_t count) {
        if (TERMS == 2) {
            const vi high = (q + 128) >> 8;
            const vi low = q - (high << 8);
            sum[1] += low;
            store_first(values + stride + i, low, count);
            q = high;
        }
        sum[0] += q;
        store_first(values + i, q, count);
    };
    for_row(
        n, [&](int64_t i) { put(to_integers(load(x + i) / divisor), i, W); },
        [&](int64_t i, int64_t rest) { put(to_integers(load_first(x + i, rest) / divisor), i, rest); });
    for (int term = 0; term < TERMS; ++term) totals[term] = sum_lanes(sum[term]);
}

template <class T, int TERMS>
void prepare_row(const PackedWeight& w, const T* x, char* prepared) {
    const IntShape shape = int_shape(w);
    int8_t* values = reinterpret_cast<int8_t*>(prepared);
    GroupSums* sums = reinterpret_cast<GroupSums*>(prepared + sums_at(w, shape));
    for (int64_t group = 0; group < shape.groups; ++group) {
        const int64_t first = group * w.group, n = smaller(w.group, w.k - first);
        const uint32_t bits = largest_bits(x + first, n);
        const bool finite = bits < 0x7f800000u;
        float largest;
        memcpy(&largest, &bits, 4);
        const float scale = finite ? largest / (TERMS == 1 ? 127.0f : 32639.0f) : __builtin_nanf("");
        int8_t* out = values + group * shape.padded_group;
        int32_t totals[2] = {};
        if (finite) {
            round_group<T, TERMS>(x + first, n, scale < 1e-38f ? 1e-38f : scale, out, shape.padded_inputs, totals);
        }
        for (int term = 0; term < TERMS; ++term) {
            const int64_t from = finite ? n : 0;
            memset(out + term * shape.padded_inputs + from, 0, static_cast<size_t>(shape.padded_group - from));
            const float own = TERMS == 2 && term == 0 ? 256.0f * scale : scale;
            sums[term * shape.groups + group] = {-shape.zero * totals[term], own,
                                                 own * static_cast<float>(totals[term])};
        }
    }
}

template <class T>
void prepare_terms(const PackedWeight& w, const char* row, char* prepared) {
    const T* x = reinterpret_cast<const T*>(row);
    return num_terms(w) == 1 ? prepare_row<T, 1>(w, x, prepared) : prepare_row<T, 2>(w, x, prepared);
}

} // namespace

bool int_takes(const PackedWeight&, DType) { return false; }

int64_t int_row_bytes(const PackedWeight& w) {
    const IntShape shape = int_shape(w);
    const int64_t sums = num_terms(w) * shape.groups * static_cast<int64_t>(sizeof(GroupSums));
    return round_up(sums_at(w, shape) + sums, 64);
}

void int_prepare(const PackedWeight& w, DType x, const char* row, char* prepared) {
    switch (x) {
    case DType::f32: return prepare_terms<float>(w, row, prepared);
    case DType::bf16: return prepare_terms<bf16>(w, row, prepared);
    case DType::f16: return prepare_terms<f16>(w, row, prepared);
    }
}

int64_t int_scratch(const PackedWeight& w, int64_t rows) { return rows * num_terms(w) * (PANEL * 4 + 2 * 8); }

void int_multiply(const PanelArgs& args, const PanelTask& task, char* scratch) {
    const PackedWeight& w = *args.weight;
    const IntShape shape = int_shape(w);
    const int64_t terms = num_terms(w), num_rows = task.row_end - task.row_begin;
    RowTerms rows;
    rows.count = num_rows * terms;
    rows.totals = scratch;
    rows.values = reinterpret_cast<const int8_t**>(scratch + rows.count * PANEL * 4);
    rows.sums = reinterpret_cast<const GroupSums**>(rows.values + rows.count);
    for (int64_t i = 0; i < rows.count; ++i) {
        const char* row = args.x + (task.row_begin + i / terms) * args.x_stride;
        rows.values[i] = reinterpret_cast<const int8_t*>(row) + i % terms * shape.padded_inputs;
        rows.sums[i] = reinterpret_cast<const GroupSums*>(row + sums_at(w, shape)) + i % terms * shape.groups;
    }
    const auto product = panel_product(w);
    const int64_t width = args.out_dtype == DType::f32 ? 4 : 2;
    Finish f{&w, rows.totals, num_rows, terms, rows.sums, 0, args.out + task.row_begin * args.out_stride * width,
             args.out_stride, args.accumulate};
    for (f.panel = task.panel_begin; f.panel < task.panel_end; ++f.panel) {
        product(shape, w.panels + f.panel * shape.panel_bytes, rows);
        finish_panel(f, args.out_dtype);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
