// Products with integer panels. Integer sums are exact, whatever their order; float sums go group by group in order, so
// that a row's result is the same in every tile, block, batch and thread.
//
// A tile is up to TILE_ROWS rows (terms of rows, see linear_int.hpp) times the PANEL outputs of a panel. With more rows
// than that a panel is taken in blocks, which all tiles use; meanwhile each tile fetches its share of the next block.
// Few tiles wait for memory, so that blocks and what follows them fit the first-level cache; many stream them from the
// second level at no loss, and larger blocks mean that totals leave the registers less often.
#include "../linear_int.hpp"
#include "gemm.hpp"
#include "leaves.hpp"
#include "simd.hpp"

#if defined(__SSE2__) && !defined(__AVX__)
#include <emmintrin.h>
#endif

namespace pando {
namespace PANDO_LEVEL {

namespace {

// Where bytes are widened to 16 bits first, that takes half of the 16 registers.
constexpr int INT_TILE_ROWS = W == 16 ? TILE_ROWS : 3;
// Short groups of 4 bits add to their totals often. Three rows of totals stay in registers, which in many tiles is
// worth more than unpacking a weight for more rows at once; longer groups and bytes gain nothing.
constexpr int GROUP_TILE_ROWS = 3;
constexpr int64_t SHORT_GROUP_STEPS = 8;
constexpr int MAX_REGISTER_TOTALS = W == 16 ? GROUP_TILE_ROWS * TILE_VECTORS : 2;
constexpr int64_t BLOCK_BYTES = 16 << 10;
constexpr int64_t LARGE_BLOCK_BYTES = 128 << 10;
constexpr int64_t MANY_TILES = 6;
// How far ahead a single tile fetches its weights.
constexpr int64_t FETCH_AHEAD = 12 << 10;

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
inline vi multiply_pairs(vu a, vs b) {
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
    acc += multiply_pairs(bytes & 0x00ff00ffu, quads.even);
    return acc + multiply_pairs(bytes >> 8 & 0x00ff00ffu, quads.odd);
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
    const char* weights;   // of the block
    const int8_t* values;  // of the first row: its first input in the block
    const GroupSums* sums; // the same
    int64_t stride;        // bytes from a row to the next, of values and sums
    char* totals;          // [rows][PANEL] int32 or float
    int64_t groups, group_steps;
    bool first;  // block of its panel
    Ahead ahead; // lines per Form::unroll steps
    bool alone;  // the panel's only tile: fetches FETCH_AHEAD of itself

    const int8_t* values_of(int64_t row) const { return values + row * stride; }
    const GroupSums& sums_of(int64_t row, int64_t group) const {
        return reinterpret_cast<const GroupSums*>(reinterpret_cast<const char*>(sums) + row * stride)[group];
    }
};

// I8: int32 totals. Grouped: float totals, group by group.
template <bool GROUPED, bool NIBBLES, bool OFFSETS>
struct Form {
    static constexpr bool grouped = GROUPED, nibbles = NIBBLES, offsets = OFFSETS;
    static constexpr int64_t head_bytes = !GROUPED ? 0 : PANEL * (OFFSETS ? 4 : 2);
    static constexpr int64_t step_inputs = NIBBLES ? 8 : 4;
    static constexpr int64_t unroll = NIBBLES ? 1 : 4; // more 4-bit steps would not fit the registers
};

template <int R>
inline void accumulate(vi (&acc)[R][TILE_VECTORS], const vu (&bytes)[TILE_VECTORS], const int8_t* const (&values)[R],
                       int64_t at) {
    PANDO_UNROLL
    for (int r = 0; r < R; ++r) {
        const Quads quads = broadcast(load_word(values[r] + at));
        PANDO_UNROLL
        for (int c = 0; c < TILE_VECTORS; ++c) acc[r][c] = dot(acc[r][c], bytes[c], quads);
    }
}

// Adds a group's product to the totals: total += ((product + shift * row sum) * scale) * row scale.
template <class F, int R, class Total>
inline void add_group(const Tile& tile, int64_t group, const f16* scales, const vi (&acc)[R][TILE_VECTORS],
                      const Total& total) {
    vf scale[TILE_VECTORS];
    PANDO_UNROLL
    for (int c = 0; c < TILE_VECTORS; ++c) scale[c] = load(scales + c * W);
    PANDO_UNROLL
    for (int r = 0; r < R; ++r) {
        const GroupSums& sums = tile.sums_of(r, group);
        const vf row_scale = splat(sums.scale), row_sum = splat(sums.sum);
        PANDO_UNROLL
        for (int c = 0; c < TILE_VECTORS; ++c) {
            vf product = __builtin_convertvector(acc[r][c], vf);
            if constexpr (F::offsets) product += load(scales + PANEL + c * W) * row_sum;
            product *= scale[c];
            total.set(r, c, total.get(r, c) + product * row_scale);
        }
    }
}

// Totals [R][TILE_VECTORS] in memory, or kept in registers while a small tile works.
struct MemoryTotals {
    char* data;

    char* at(int r, int c) const { return data + r * PANEL * 4 + c * PANDO_VECTOR_BYTES; }
    vf get(int r, int c) const { return load(reinterpret_cast<const float*>(at(r, c))); }
    void set(int r, int c, vf value) const { store(reinterpret_cast<float*>(at(r, c)), value); }
};

template <int R>
struct RegisterTotals {
    vf (&values)[R][TILE_VECTORS];

    vf get(int r, int c) const { return values[r][c]; }
    void set(int r, int c, vf value) const { values[r][c] = value; }
};

template <class F, int R>
inline void start_group(const Tile& tile, int64_t group, const MemoryTotals& memory, vi (&acc)[R][TILE_VECTORS]) {
    PANDO_UNROLL
    for (int r = 0; r < R; ++r) {
        const vi start = splat_int(tile.sums_of(r, group).start);
        PANDO_UNROLL
        for (int c = 0; c < TILE_VECTORS; ++c) {
            if (F::grouped || tile.first) {
                acc[r][c] = start;
            } else {
                memcpy(&acc[r][c], memory.at(r, c), sizeof(vi));
            }
        }
    }
}

template <class F, int R>
__attribute__((always_inline)) inline void multiply_step(const char* weights, const int8_t* const (&values)[R],
                                                         int64_t at, vi (&acc)[R][TILE_VECTORS]) {
    vu bytes[TILE_VECTORS];
    PANDO_UNROLL
    for (int c = 0; c < TILE_VECTORS; ++c) bytes[c] = load_bytes(weights + c * PANDO_VECTOR_BYTES);
    if constexpr (F::nibbles) {
        vu low[TILE_VECTORS];
        PANDO_UNROLL
        for (int c = 0; c < TILE_VECTORS; ++c) low[c] = bytes[c] & 0x0f0f0f0fu;
        accumulate(acc, low, values, at);
        PANDO_UNROLL
        for (int c = 0; c < TILE_VECTORS; ++c) bytes[c] = bytes[c] >> 4 & 0x0f0f0f0fu;
        accumulate(acc, bytes, values, at + 4);
    } else {
        accumulate(acc, bytes, values, at);
    }
}

template <class F, int R>
inline void multiply_steps(const Tile& tile, int64_t input, const char* weights, Ahead& ahead,
                           vi (&acc)[R][TILE_VECTORS]) {
    const int8_t* values[R];
    PANDO_UNROLL
    for (int r = 0; r < R; ++r) values[r] = tile.values_of(r) + input;
    const int64_t steps = tile.group_steps;
    int64_t step = 0;
    if (tile.alone) {
        for (; step < steps; ++step, weights += STEP_BYTES) {
            for (int64_t line = 0; line < STEP_BYTES; line += 64) __builtin_prefetch(weights + FETCH_AHEAD + line);
            multiply_step<F>(weights, values, step * F::step_inputs, acc);
        }
        return;
    }
    for (; step + F::unroll <= steps; step += F::unroll) {
        ahead.fetch();
        PANDO_UNROLL
        for (int u = 0; u < F::unroll; ++u)
            multiply_step<F>(weights + u * STEP_BYTES, values, (step + u) * F::step_inputs, acc);
        weights += F::unroll * STEP_BYTES;
    }
    for (; step < steps; ++step, weights += STEP_BYTES) multiply_step<F>(weights, values, step * F::step_inputs, acc);
}

// The outputs of TILE_VECTORS vectors from `column` on.
template <class F, int R>
inline void multiply_columns(const Tile& tile, int64_t column) {
    constexpr bool in_registers = F::grouped && R * TILE_VECTORS <= MAX_REGISTER_TOTALS;
    const MemoryTotals memory{tile.totals + column * 4};
    const char* weights = tile.weights;
    Ahead ahead = tile.ahead;
    vf running[R][TILE_VECTORS];
    if constexpr (F::grouped) {
        PANDO_UNROLL
        for (int r = 0; r < R; ++r) {
            PANDO_UNROLL
            for (int c = 0; c < TILE_VECTORS; ++c) {
                if (tile.first) memory.set(r, c, vf{});
                if (in_registers) running[r][c] = memory.get(r, c);
            }
        }
    }
    for (int64_t group = 0; group < tile.groups; ++group) {
        if (tile.alone) {
            for (int64_t line = 0; line < F::head_bytes; line += 64) __builtin_prefetch(weights + FETCH_AHEAD + line);
        }
        // Or the compiler keeps the totals in registers that the products need.
        asm volatile("" ::: "memory");
        vi acc[R][TILE_VECTORS];
        start_group<F>(tile, group, memory, acc);
        multiply_steps<F>(tile, group * tile.group_steps * F::step_inputs, weights + F::head_bytes + column * 4, ahead,
                          acc);
        const f16* scales = reinterpret_cast<const f16*>(weights) + column;
        if constexpr (in_registers) {
            add_group<F>(tile, group, scales, acc, RegisterTotals<R>{running});
        } else if constexpr (F::grouped) {
            add_group<F>(tile, group, scales, acc, memory);
        } else {
            PANDO_UNROLL
            for (int r = 0; r < R; ++r) {
                PANDO_UNROLL
                for (int c = 0; c < TILE_VECTORS; ++c) memcpy(memory.at(r, c), &acc[r][c], sizeof(vi));
            }
        }
        weights += F::head_bytes + tile.group_steps * STEP_BYTES;
    }
    if constexpr (in_registers) {
        PANDO_UNROLL
        for (int r = 0; r < R; ++r) {
            PANDO_UNROLL
            for (int c = 0; c < TILE_VECTORS; ++c) memory.set(r, c, running[r][c]);
        }
    }
}

template <class F, int R>
__attribute__((noinline)) void multiply_tile(const Tile& tile) {
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
    case 6: return multiply_tile<F, 6>(tile);
#endif
    }
}

// ---- the sums of a tile ----

// Totals [rows * TERMS][PANEL] with the factors applied: the sums of a row as finish_rows takes them.
template <bool INTEGERS, int TERMS>
struct ScaledTotals {
    const char* totals;
    const GroupSums* sums; // of the first row and term
    int64_t stride;        // bytes from a term to the next
    const float* factors;

    vf term(int64_t row, int t, int64_t i) const {
        const char* at = totals + ((row * TERMS + t) * PANEL + i) * 4;
        if constexpr (INTEGERS) {
            const char* own = reinterpret_cast<const char*>(sums) + (row * TERMS + t) * stride;
            return __builtin_convertvector(reinterpret_cast<vi>(load_bytes(at)), vf) *
                   reinterpret_cast<const GroupSums*>(own)->scale;
        }
        return load(reinterpret_cast<const float*>(at));
    }

    vf at(int64_t row, int64_t i) const {
        vf value = term(row, 0, i);
        if constexpr (TERMS == 2) value += term(row, 1, i);
        return value * load(factors + i);
    }
};

// ---- panels ----

int64_t num_terms(const PackedWeight& w) { return w.activation_bits == 8 ? 1 : 2; }

// A prepared term: its values, then its sums.
int64_t sums_at(const IntShape& shape) { return round_up(shape.padded_inputs, 4); }

int64_t term_bytes(const IntShape& shape) {
    return round_up(sums_at(shape) + shape.groups * static_cast<int64_t>(sizeof(GroupSums)), 64);
}

// A panel's blocks: whole groups, or for i8 steps of its only one.
struct Blocks {
    int64_t units, per_block, unit_bytes, unit_inputs;
};

template <class F>
Blocks blocks_of(const IntShape& shape, int64_t num_tiles) {
    Blocks blocks;
    blocks.units = F::grouped ? shape.groups : shape.group_steps;
    blocks.unit_bytes = F::grouped ? shape.group_bytes : STEP_BYTES;
    blocks.unit_inputs = F::grouped ? shape.padded_group : shape.step_inputs;
    const int64_t bytes = num_tiles < MANY_TILES ? BLOCK_BYTES : LARGE_BLOCK_BYTES;
    blocks.per_block = num_tiles == 1
                           ? blocks.units
                           : even_blocks(blocks.units, bytes / blocks.unit_bytes, F::grouped ? 1 : F::unroll);
    return blocks;
}

// Terms of rows, one after another: where they are and where their totals go.
struct RowTerms {
    const char* data;
    int64_t stride, sums_at; // bytes: from a term to the next, and of its sums
    char* totals;
    int64_t count, terms;
    int64_t first; // row of the result

    const int8_t* values(int64_t i) const { return reinterpret_cast<const int8_t*>(data + i * stride); }
    const GroupSums* sums(int64_t i) const { return reinterpret_cast<const GroupSums*>(data + i * stride + sums_at); }

    // Rows [begin, end), counted from the first.
    template <bool INTEGERS>
    void finish(const PanelArgs& args, int64_t panel, int64_t begin, int64_t end) const {
        const float* factors = args.weight->scale + panel * PANEL;
        const char* from = totals + begin * terms * PANEL * 4;
        const GroupSums* of = sums(begin * terms);
        if (terms == 1) {
            finish_rows(args, panel, ScaledTotals<INTEGERS, 1>{from, of, stride, factors}, first + begin, end - begin);
        } else {
            finish_rows(args, panel, ScaledTotals<INTEGERS, 2>{from, of, stride, factors}, first + begin, end - begin);
        }
    }
};

template <class F>
void multiply_panels(const PanelArgs& args, const PanelTask& task, const IntShape& shape, const RowTerms& rows) {
    const bool low = F::nibbles && shape.group_steps <= SHORT_GROUP_STEPS && rows.count > INT_TILE_ROWS;
    const Tiles tiles(rows.count, low ? GROUP_TILE_ROWS : INT_TILE_ROWS);
    const Blocks blocks = blocks_of<F>(shape, tiles.count);
    Tile tile;
    tile.stride = rows.stride;
    tile.alone = tiles.count == 1;
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
        int64_t finished = 0;
        for (int64_t unit = 0; unit < blocks.units; unit += blocks.per_block) {
            const int64_t units = smaller(blocks.per_block, blocks.units - unit);
            tile.weights = args.weight->panels + panel * shape.panel_bytes + unit * blocks.unit_bytes;
            tile.groups = F::grouped ? units : 1;
            tile.group_steps = F::grouped ? shape.group_steps : units;
            tile.first = unit == 0;
            const Shares shares(tile.weights + units * blocks.unit_bytes, units * blocks.unit_bytes / 64,
                                tile.groups * (tile.group_steps / F::unroll), tiles.count);
            for (int64_t i = 0, begin = 0, end; i < tiles.count; ++i, begin = end) {
                end = begin + tiles.rows(i);
                tile.values = rows.values(begin) + unit * blocks.unit_inputs;
                tile.sums = rows.sums(begin) + (F::grouped ? unit : 0);
                tile.totals = rows.totals + begin * PANEL * 4;
                tile.ahead = shares.of(i);
                multiply_rows<F>(tile, end - begin);
                if (unit + units < blocks.units) continue;
                const int64_t complete = rows.terms == 1 ? end : end / 2;
                rows.finish<!F::grouped>(args, panel, finished, complete);
                finished = complete;
            }
        }
    }
}

// ---- rounding of activations ----

inline vi max_signed(vi a, vi b) {
#if PANDO_VECTOR_BYTES == 64
    return reinterpret_cast<vi>(_mm512_max_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
    return a > b ? a : b;
#endif
}

// How far ahead elements of rows, and the room for their values, are fetched while rows are rounded.
constexpr int64_t ROUND_AHEAD = 2048;

// The largest magnitude of a group's elements, as bits: infinities and NaN are above all numbers. Fetches what comes
// after the group and the room for it, which as a rule are the next ones.
template <class T>
__attribute__((always_inline)) inline uint32_t largest_bits(const T* x, int64_t n, const int8_t* values) {
    vi largest{}, other{};
    const auto include = [](vi& best, vf v) {
        best = max_signed(best, reinterpret_cast<vi>(bits_of(v) & 0x7fffffffu));
    };
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        __builtin_prefetch(x + i + ROUND_AHEAD);
        __builtin_prefetch(values + i + ROUND_AHEAD, 1);
        include(largest, load(x + i));
        include(other, load(x + i + W));
    }
    for (; i < n; i += W) include(largest, i + W <= n ? load(x + i) : load_first(x + i, n - i));
    largest = max_signed(largest, other);
#if PANDO_VECTOR_BYTES == 64
    return static_cast<uint32_t>(_mm512_reduce_max_epi32(reinterpret_cast<__m512i>(largest)));
#else
    int32_t best = 0;
    for (int i = 0; i < W; ++i) best = largest[i] > best ? largest[i] : best;
    return static_cast<uint32_t>(best);
#endif
}

inline int32_t sum_lanes(vi x) {
#if PANDO_VECTOR_BYTES == 64
    return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(x));
#else
    int32_t total = 0;
    for (int i = 0; i < W; ++i) total += x[i];
    return total;
#endif
}

// Rounded to integers, ties to even; |x| < 2^22.
inline vi to_integers(vf x) { return reinterpret_cast<vi>(bits_of(x + 0x1.8p23f)) - 0x4b400000; }

#if defined(__FMA__) && PANDO_VECTOR_BYTES == 64
inline vf multiply_add(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
inline vf multiply_add(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
#endif

// x / divisor. In the ordinary range the remainder of a product with the inverse corrects it to what the division gives
// (Markstein 1990), in less than half the time.
template <bool ORDINARY>
inline vf quotient(vf x, float divisor, float inverse) {
#if defined(__FMA__)
    if constexpr (ORDINARY) {
        const vf guess = x * inverse;
        return multiply_add(multiply_add(-guess, splat(divisor), x), splat(inverse), guess);
    }
#endif
    (void)inverse;
    return x / divisor;
}

inline void store_first(int8_t* p, vi x, int64_t n) {
    const vb bytes = __builtin_convertvector(x, vb);
    memcpy(p, &bytes, static_cast<size_t>(n));
}

// Values and their sums of one group of n inputs; each term `stride` bytes after the one before.
template <class T, int TERMS, bool ORDINARY>
__attribute__((always_inline)) inline void round_group(const T* x, int64_t n, float divisor, int8_t* values,
                                                       int64_t stride, int32_t (&totals)[2]) {
    const float inverse = 1.0f / divisor;
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
        n, [&](int64_t i) { put(to_integers(quotient<ORDINARY>(load(x + i), divisor, inverse)), i, W); },
        [&](int64_t i, int64_t rest) {
            put(to_integers(quotient<ORDINARY>(load_first(x + i, rest), divisor, inverse)), i, rest);
        });
    for (int term = 0; term < TERMS; ++term) totals[term] = sum_lanes(sum[term]);
}

// Where a row's rounded groups go.
struct RoundedRow {
    IntShape shape;
    int8_t* values;
    GroupSums* sums;
    int64_t stride; // bytes from a term to the next

    GroupSums& sums_of(int term, int64_t group) const {
        return reinterpret_cast<GroupSums*>(reinterpret_cast<char*>(sums) + term * stride)[group];
    }
};

template <class T, int TERMS>
__attribute__((noinline)) void round_unusual_group(const T* x, int64_t n, float divisor, int8_t* values, int64_t stride,
                                                   int32_t (&totals)[2]) {
    round_group<T, TERMS, false>(x, n, divisor, values, stride, totals);
}

// A group of n inputs; x is that of the group.
template <class T, int TERMS>
__attribute__((always_inline)) inline void prepare_group(const T* x, int64_t n, int64_t group, const RoundedRow& row) {
    int8_t* out = row.values + group * row.shape.padded_group;
    const uint32_t bits = largest_bits(x, n, out);
    const bool finite = bits < 0x7f800000u;
    float largest;
    memcpy(&largest, &bits, 4);
    const float scale = finite ? largest / (TERMS == 1 ? 127.0f : 32639.0f) : __builtin_nanf("");
    int32_t totals[2] = {};
    if (scale > 1e-30f && scale < 1e30f) {
        round_group<T, TERMS, true>(x, n, scale, out, row.stride, totals);
    } else if (finite) {
        round_unusual_group<T, TERMS>(x, n, scale < 1e-38f ? 1e-38f : scale, out, row.stride, totals);
    }
    for (int term = 0; term < TERMS; ++term) {
        const int64_t from = finite ? n : 0, rest = row.shape.padded_group - from;
        if (rest > 0) memset(out + term * row.stride + from, 0, static_cast<size_t>(rest));
        const float own = TERMS == 2 && term == 0 ? 256.0f * scale : scale;
        row.sums_of(term, group) = {-row.shape.zero * totals[term], own, static_cast<float>(totals[term])};
    }
}

// Whole groups of a size that the compiler knows. Returns how many.
template <class T, int TERMS, int N>
int64_t prepare_groups(const T* x, int64_t k, const RoundedRow& row) {
    for (int64_t group = 0; group < k / N; ++group) prepare_group<T, TERMS>(x + group * N, N, group, row);
    return k / N;
}

template <class T, int TERMS>
void prepare_row(const PackedWeight& w, const T* x, char* prepared) {
    const IntShape shape = int_shape(w);
    const RoundedRow row{shape, reinterpret_cast<int8_t*>(prepared),
                         reinterpret_cast<GroupSums*>(prepared + sums_at(shape)), term_bytes(shape)};
    int64_t group = w.group == 32    ? prepare_groups<T, TERMS, 32>(x, w.k, row)
                    : w.group == 64  ? prepare_groups<T, TERMS, 64>(x, w.k, row)
                    : w.group == 128 ? prepare_groups<T, TERMS, 128>(x, w.k, row)
                                     : 0;
    for (; group < shape.groups; ++group)
        prepare_group<T, TERMS>(x + group * w.group, smaller(w.group, w.k - group * w.group), group, row);
}

template <class T>
void prepare_terms(const PackedWeight& w, const char* row, char* prepared) {
    const T* x = reinterpret_cast<const T*>(row);
    return num_terms(w) == 1 ? prepare_row<T, 1>(w, x, prepared) : prepare_row<T, 2>(w, x, prepared);
}

} // namespace

bool int_takes(const PackedWeight&, DType) { return false; }

int64_t int_row_bytes(const PackedWeight& w) { return num_terms(w) * term_bytes(int_shape(w)); }

void int_prepare(const PackedWeight& w, DType x, const char* row, char* prepared) {
    switch (x) {
    case DType::f32: return prepare_terms<float>(w, row, prepared);
    case DType::bf16: return prepare_terms<bf16>(w, row, prepared);
    case DType::f16: return prepare_terms<f16>(w, row, prepared);
    }
}

int64_t int_scratch(const PackedWeight& w, int64_t rows) { return rows * num_terms(w) * PANEL * 4; }

void int_multiply(const PanelArgs& args, const PanelTask& task, char* scratch) {
    const PackedWeight& w = *args.weight;
    const IntShape shape = int_shape(w);
    const int64_t terms = num_terms(w);
    const RowTerms rows{args.x + task.row_begin * args.x_stride,
                        term_bytes(shape),
                        sums_at(shape),
                        scratch,
                        (task.row_end - task.row_begin) * terms,
                        terms,
                        task.row_begin};
    switch (w.kind) {
    case WeightKind::i8: return multiply_panels<Form<false, false, false>>(args, task, shape, rows);
    case WeightKind::g8:
        return w.has_offsets ? multiply_panels<Form<true, false, true>>(args, task, shape, rows)
                             : multiply_panels<Form<true, false, false>>(args, task, shape, rows);
    default:
        return w.has_offsets ? multiply_panels<Form<true, true, true>>(args, task, shape, rows)
                             : multiply_panels<Form<true, true, false>>(args, task, shape, rows);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
