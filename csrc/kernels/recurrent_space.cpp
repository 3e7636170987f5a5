// Mamba-2 and Mamba. Neither's update needs its output, so a few rows of a state stay in registers for a whole chunk of
// tokens; their lanes are neighbouring entries of the state, which is where they lie in memory, too.
#include "leaves.hpp"
#include "recurrent_rows.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

constexpr int64_t CHUNK = 16;

// b and c of a chunk, widened: rows of `padded` floats, lanes beyond the state's size are 0.
struct Inputs {
    float* b;
    float* c;
    int64_t padded;
};

template <class T>
void widen_rows(const char* x, int64_t offset, int64_t stride, int64_t first, int64_t last, int64_t n, float* out,
                int64_t out_stride) {
    const T* row = reinterpret_cast<const T*>(x) + offset;
    for (int64_t token = first; token < last; ++token, out += out_stride) widen(row + token * stride, n, 1.0f, out);
}

// y [tokens][y_stride] = or += the lanes' sums.
inline void put(float* y, float value, bool add) { *y = add ? *y + value : value; }

// ---- Mamba-2 ----

// Vectors of a state's row that stay in registers; two rows at a time.
constexpr int SPACE_TILE = W == 16 ? 8 : 4;

struct SpaceChunk {
    Inputs inputs;
    float* decay; // [CHUNK]
    float* dt_x;  // [CHUNK][rows]
    float* y;     // [CHUNK][rows]
    int64_t rows; // stride of the two above
};

// Decoding is bound by the memory a state comes from: asks for what comes this much later. Never faults.
constexpr int64_t AHEAD = 4096;
inline void fetch_ahead(const float* p) { __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD, 1); }

// ROWS rows of the state, N vectors of each, through the tokens of a chunk; `last` entries of the last vector count.
template <int ROWS, int N>
void space_tile(const SpaceChunk& chunk, float* state, int64_t stride, int64_t last, int64_t row, int64_t entry,
                int64_t tokens) {
    vf s[ROWS][N];
    for (int r = 0; r < ROWS; ++r) {
        for (int j = 0; j < N; ++j) {
            s[r][j] = load_part(state + r * stride + j * W, j == N - 1 ? last : W);
            fetch_ahead(state + r * stride + j * W);
        }
    }
    const auto advance = [&](int64_t t, vf* total) {
        const float* const b = chunk.inputs.b + t * chunk.inputs.padded + entry;
        const float* const c = chunk.inputs.c + t * chunk.inputs.padded + entry;
        const vf decay = splat(chunk.decay[t]);
        vf x[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            x[r] = splat(chunk.dt_x[t * chunk.rows + row + r]);
            total[r] = vf{};
        }
        for (int j = 0; j < N; ++j) {
            const vf b_j = load(b + j * W), c_j = load(c + j * W);
            for (int r = 0; r < ROWS; ++r) {
                s[r][j] = fused(x[r], b_j, decay * s[r][j]);
                total[r] = fused(s[r][j], c_j, total[r]);
            }
        }
    };
    float* const y = chunk.y + row;
    int64_t t = 0;
    for (; t + 2 <= tokens; t += 2) { // four sums cost little more than one
        vf first[2] = {}, second[2] = {};
        advance(t, first);
        advance(t + 1, second);
        const v4 found = sums(first[0], first[1], second[0], second[1]);
        for (int r = 0; r < ROWS; ++r) put(y + t * chunk.rows + r, found[r], entry > 0);
        for (int r = 0; r < ROWS; ++r) put(y + (t + 1) * chunk.rows + r, found[2 + r], entry > 0);
    }
    if (t < tokens) {
        vf first[2] = {};
        advance(t, first);
        const v4 found = sums(first[0], first[1], vf{}, vf{});
        for (int r = 0; r < ROWS; ++r) put(y + t * chunk.rows + r, found[r], entry > 0);
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int j = 0; j < N; ++j) store_part(state + r * stride + j * W, s[r][j], j == N - 1 ? last : W);
    }
}

template <int ROWS, int N>
void space_tiles(int64_t vectors, const SpaceChunk& chunk, float* state, int64_t stride, int64_t last, int64_t row,
                 int64_t entry, int64_t tokens) {
    if constexpr (N > 0) {
        if (vectors == N) {
            space_tile<ROWS, N>(chunk, state, stride, last, row, entry, tokens);
        } else {
            space_tiles<ROWS, N - 1>(vectors, chunk, state, stride, last, row, entry, tokens);
        }
    }
}

template <int ROWS>
void space_rows(const SpaceChunk& chunk, float* state, int64_t size, int64_t row, int64_t tokens) {
    for (int64_t entry = 0; entry < size; entry += SPACE_TILE * W) {
        const int64_t entries = smaller(SPACE_TILE * W, size - entry), vectors = round_up(entries, W) / W;
        const int64_t last = entries - (vectors - 1) * W;
        space_tiles<ROWS, SPACE_TILE>(vectors, chunk, state + entry, size, last, row, entry, tokens);
    }
}

// y (+ d x) of a chunk to its place; x and out are the first token's.
template <class T>
void finish_row(const float* y, const T* x, float d, bool has_d, int64_t n, T* out) {
    const vf factor = splat(d);
    for_row(
        n,
        [&](int64_t i) {
            const vf value = load(y + i);
            store(out + i, has_d ? fused(factor, load(x + i), value) : value);
        },
        [&](int64_t i, int64_t rest) {
            const vf value = load_first(y + i, rest);
            store_first(out + i, has_d ? fused(factor, load_first(x + i, rest), value) : value, rest);
        });
}

template <class T>
void space_chunk(T*, const SpaceArgs& args, const RecurrentTask& task, int64_t head, float* state,
                 const SpaceChunk& chunk, int64_t first, int64_t last) {
    const int64_t group = head / (args.heads / args.groups), size = args.state_size, tokens = last - first;
    const int64_t rows = task.part_end - task.part_begin;
    const T* x =
        reinterpret_cast<const T*>(args.x) + first * args.x_token_stride + head * args.x_head_stride + task.part_begin;
    widen_rows<T>(args.b, group * args.b_group_stride, args.b_token_stride, first, last, size, chunk.inputs.b,
                  chunk.inputs.padded);
    widen_rows<T>(args.c, group * args.c_group_stride, args.c_token_stride, first, last, size, chunk.inputs.c,
                  chunk.inputs.padded);
    for (int64_t t = 0; t < tokens; ++t) {
        const float dt = args.dt[(first + t) * args.heads + head];
        chunk.decay[t] = expf(dt * args.a[head]);
        widen(x + t * args.x_token_stride, rows, dt, chunk.dt_x + t * chunk.rows);
    }
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2) space_rows<2>(chunk, state + row * size, size, row, tokens);
    if (row < rows) space_rows<1>(chunk, state + row * size, size, row, tokens);
    T* out = reinterpret_cast<T*>(args.out) + (first * args.heads + head) * args.head_dim + task.part_begin;
    for (int64_t t = 0; t < tokens; ++t) {
        finish_row(chunk.y + t * chunk.rows, x + t * args.x_token_stride, args.d == nullptr ? 0.0f : args.d[head],
                   args.d != nullptr, rows, out + t * args.heads * args.head_dim);
    }
}

// ---- Mamba ----

// Channels and vectors of each one's state that stay in registers.
constexpr int SELECTIVE_ROWS = 4;
constexpr int SELECTIVE_TILE = 2;

struct SelectiveChunk {
    Inputs inputs;
    float* x;        // [CHUNK][CHANNEL_BLOCK]
    float* y;        // [CHUNK][CHANNEL_BLOCK]
    const float* dt; // of the block's first channel and the chunk's first token
    int64_t dt_stride;
};

template <int ROWS, int N>
void selective_tile(const SelectiveChunk& chunk, const float* a, float* state, int64_t stride, int64_t last,
                    int64_t row, int64_t entry, int64_t tokens) {
    vf s[ROWS][N], rate[ROWS][N];
    for (int r = 0; r < ROWS; ++r) {
        for (int j = 0; j < N; ++j) {
            const int64_t at = r * stride + j * W, n = j == N - 1 ? last : W;
            s[r][j] = load_part(state + at, n);
            rate[r][j] = load_part(a + at, n);
        }
    }
    for (int64_t t = 0; t < tokens; ++t) {
        const float* const b = chunk.inputs.b + t * chunk.inputs.padded + entry;
        const float* const c = chunk.inputs.c + t * chunk.inputs.padded + entry;
        const float* const x = chunk.x + t * CHANNEL_BLOCK + row;
        const float* const dt = chunk.dt + t * chunk.dt_stride + row;
        vf total[SELECTIVE_ROWS] = {};
        for (int r = 0; r < ROWS; ++r) {
            const vf step = splat(dt[r]), dt_x = splat(dt[r] * x[r]);
            for (int j = 0; j < N; ++j) {
                s[r][j] = fused(dt_x, load(b + j * W), vexp(step * rate[r][j]) * s[r][j]);
                total[r] = fused(s[r][j], load(c + j * W), total[r]);
            }
        }
        const v4 y = sums(total[0], total[1], total[2], total[3]);
        for (int r = 0; r < ROWS; ++r) put(chunk.y + t * CHANNEL_BLOCK + row + r, y[r], entry > 0);
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int j = 0; j < N; ++j) store_part(state + r * stride + j * W, s[r][j], j == N - 1 ? last : W);
    }
}

template <int ROWS>
void selective_rows(const SelectiveChunk& chunk, const float* a, float* state, int64_t size, int64_t row,
                    int64_t tokens) {
    for (int64_t entry = 0; entry < size; entry += SELECTIVE_TILE * W) {
        const int64_t entries = smaller(SELECTIVE_TILE * W, size - entry);
        if (entries > W) {
            selective_tile<ROWS, 2>(chunk, a + entry, state + entry, size, entries - W, row, entry, tokens);
        } else {
            selective_tile<ROWS, 1>(chunk, a + entry, state + entry, size, entries, row, entry, tokens);
        }
    }
}

template <class T>
void selective_chunk(T*, const SelectiveArgs& args, const RecurrentTask& task, float* state, SelectiveChunk chunk,
                     int64_t first, int64_t last) {
    const int64_t begin = task.unit_begin, channels = task.unit_end - begin, size = args.state_size;
    widen_rows<T>(args.b, 0, args.b_token_stride, first, last, size, chunk.inputs.b, chunk.inputs.padded);
    widen_rows<T>(args.c, 0, args.c_token_stride, first, last, size, chunk.inputs.c, chunk.inputs.padded);
    widen_rows<T>(args.x, begin, args.x_token_stride, first, last, channels, chunk.x, CHANNEL_BLOCK);
    chunk.dt = args.dt + first * args.channels + begin;
    chunk.dt_stride = args.channels;
    const float* const a = args.a + begin * size;
    int64_t row = 0;
    for (; row + SELECTIVE_ROWS <= channels; row += SELECTIVE_ROWS) {
        selective_rows<SELECTIVE_ROWS>(chunk, a + row * size, state + row * size, size, row, last - first);
    }
    for (; row < channels; ++row) {
        selective_rows<1>(chunk, a + row * size, state + row * size, size, row, last - first);
    }
    T* out = reinterpret_cast<T*>(args.out) + begin;
    for (int64_t token = first; token < last; ++token) {
        float* const y = chunk.y + (token - first) * CHANNEL_BLOCK;
        if (args.d != nullptr) {
            const float* const x_row = chunk.x + (token - first) * CHANNEL_BLOCK;
            const float* const d = args.d + begin;
            for_row(
                channels, [&](int64_t i) { store(y + i, fused(load(d + i), load(x_row + i), load(y + i))); },
                [&](int64_t i, int64_t rest) {
                    store(y + i, fused(load_first(d + i, rest), load(x_row + i), load(y + i)));
                });
        }
        narrow(y, channels, out + token * args.channels);
    }
}

} // namespace

int64_t space_scratch(const SpaceArgs& args) {
    return 4 * CHUNK * (2 * round_up(args.state_size, 16) + 1 + 2 * round_up(args.head_dim, 16));
}

void space(const SpaceArgs& args, const RecurrentTask& task, char* scratch) {
    const int64_t padded = round_up(args.state_size, 16), stride = round_up(args.head_dim, 16);
    float* const b = reinterpret_cast<float*>(scratch);
    float* const c = b + CHUNK * padded;
    float* const decay = c + CHUNK * padded;
    const SpaceChunk chunk{{b, c, padded}, decay, decay + CHUNK, decay + CHUNK + CHUNK * stride, stride};
    const size_t bytes = static_cast<size_t>((task.part_end - task.part_begin) * args.state_size) * 4;
    for (int64_t head = task.unit_begin; head < task.unit_end; ++head) {
        const int64_t offset = (head * args.head_dim + task.part_begin) * args.state_size;
        float* const state = args.state + task.slot * args.slot_stride + offset;
        if (task.fresh) memset(state, 0, bytes);
        for_chunks(
            task, CHUNK,
            [&](int64_t first, int64_t last) {
                with_type(args.dtype,
                          [&](auto* type) { space_chunk(type, args, task, head, state, chunk, first, last); });
            },
            [&](int64_t slot) { memcpy(args.state + slot * args.slot_stride + offset, state, bytes); });
    }
}

int64_t selective_scratch(const SelectiveArgs& args) {
    return 4 * CHUNK * 2 * (round_up(args.state_size, 16) + CHANNEL_BLOCK);
}

void selective(const SelectiveArgs& args, const RecurrentTask& task, char* scratch) {
    const int64_t padded = round_up(args.state_size, 16), offset = task.unit_begin * args.state_size;
    float* const b = reinterpret_cast<float*>(scratch);
    float* const x = b + 2 * CHUNK * padded;
    const SelectiveChunk chunk{{b, b + CHUNK * padded, padded}, x, x + CHUNK * CHANNEL_BLOCK, nullptr, 0};
    float* const state = args.state + task.slot * args.slot_stride + offset;
    const size_t bytes = static_cast<size_t>((task.unit_end - task.unit_begin) * args.state_size) * 4;
    if (task.fresh) memset(state, 0, bytes);
    for_chunks(
        task, CHUNK,
        [&](int64_t first, int64_t last) {
            with_type(args.dtype, [&](auto* type) { selective_chunk(type, args, task, state, chunk, first, last); });
        },
        [&](int64_t slot) { memcpy(args.state + slot * args.slot_stride + offset, state, bytes); });
}

} // namespace PANDO_LEVEL
} // namespace pando
