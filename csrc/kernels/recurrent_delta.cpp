// Gated delta rule. A head's state [K][V] falls into columns of V that know nothing of each other; a block of them
// stays in the first-level cache for a chunk of tokens. One pass over the block does three things for a token: the
// update, the output, and what the next token's key finds in the state, so each element is loaded and stored once per
// token.
#include "leaves.hpp"
#include "recurrent_rows.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

constexpr int64_t CHUNK = 32;
// Up to so many tokens the state is worked on where it is; for more, the block is copied, because a stride that is a
// power of two would use few sets of the cache.
constexpr int64_t IN_PLACE = 3;
// Vectors of a block: as many as there are registers for.
constexpr int WIDE = W == 16 ? 4 : 2;
constexpr int64_t BLOCK = WIDE * W;
static_assert(VALUE_BLOCK % BLOCK == 0, "tasks begin with a block");

// The inputs of a chunk, in scratch; token t's row of x is x + t * its size.
struct Chunk {
    float* q;           // scaled
    float* k;           // [key_size]
    float* decayed_k;   // k times decay with channels, else k itself
    float* decay;       // [key_size] with channels, else one number
    float* beta;        // one number
    float* v;           // [BLOCK]
    float* out;         // [BLOCK]
    float* block;       // [key_dim][BLOCK]
    int64_t key_size;   // key_dim in whole vectors of the widest level
    int64_t decay_size; // 1 or key_size
};

Chunk chunk_at(const DeltaArgs& args, char* scratch) {
    Chunk chunk;
    chunk.key_size = round_up(args.key_dim, 16);
    chunk.decay_size = args.channels ? chunk.key_size : 1;
    float* at = reinterpret_cast<float*>(scratch);
    const auto take = [&](int64_t size) {
        float* const begin = at;
        at += round_up(size, 16);
        return begin;
    };
    chunk.block = take(args.key_dim * BLOCK);
    chunk.q = take(CHUNK * chunk.key_size);
    chunk.k = take(CHUNK * chunk.key_size);
    chunk.decayed_k = args.channels ? take(CHUNK * chunk.key_size) : chunk.k;
    chunk.decay = take(CHUNK * chunk.decay_size);
    chunk.beta = take(CHUNK);
    chunk.v = take(CHUNK * BLOCK);
    chunk.out = take(CHUNK * BLOCK);
    return chunk;
}

template <class T>
void widen_key(const T* x, const DeltaArgs& args, float factor, float* out) {
    if (args.normalize) {
        vf squares{};
        for_row(
            args.key_dim,
            [&](int64_t i) {
                const vf y = load(x + i);
                squares = fused(y, y, squares);
            },
            [&](int64_t i, int64_t rest) {
                const vf y = load_first(x + i, rest);
                squares = fused(y, y, squares);
            });
        factor /= sqrtf(sum(squares) + 1e-6f);
    }
    widen(x, args.key_dim, factor, out);
}

template <class T>
void prepare(const DeltaArgs& args, int64_t head, int64_t first, int64_t last, const Chunk& chunk) {
    const int64_t key_head = head / (args.value_heads / args.key_heads);
    const T* q = reinterpret_cast<const T*>(args.q) + key_head * args.q_head_stride;
    const T* k = reinterpret_cast<const T*>(args.k) + key_head * args.k_head_stride;
    for (int64_t token = first; token < last; ++token) {
        const int64_t t = token - first, at = token * args.value_heads + head;
        float* const key = chunk.k + t * chunk.key_size;
        float* const decay = chunk.decay + t * chunk.decay_size;
        widen_key(q + token * args.q_token_stride, args, args.scale, chunk.q + t * chunk.key_size);
        widen_key(k + token * args.k_token_stride, args, 1.0f, key);
        chunk.beta[t] = args.beta[at];
        if (args.channels) {
            float* const decayed = chunk.decayed_k + t * chunk.key_size;
            widen(args.log_decay + at * args.key_dim, args.key_dim, 1.0f, decay);
            for (int64_t i = 0; i < args.key_dim; i += W) {
                store(decay + i, vexp(load(decay + i)));
                store(decayed + i, load(decay + i) * load(key + i));
            }
        } else {
            *decay = expf(args.log_decay[at]);
        }
    }
}

// What a key finds in the decayed state, and after the update what the query does: sums over the keys in their order.
template <int N>
struct Sums {
    vf found[N];
};

template <int N>
Sums<N> find(const float* state, int64_t stride, const float* key, int64_t key_dim) {
    Sums<N> sums{};
    for (int64_t i = 0; i < key_dim; ++i) {
        const vf k = splat(key[i]);
        for (int j = 0; j < N; ++j) sums.found[j] = fused(k, load(state + i * stride + j * W), sums.found[j]);
    }
    return sums;
}

template <int N, bool CHANNELS, bool NEXT>
Sums<N> update(float* state, int64_t stride, const Chunk& chunk, int64_t t, int64_t key_dim, const Sums<N>& sums) {
    const float* const q = chunk.q + t * chunk.key_size;
    const float* const k = chunk.k + t * chunk.key_size;
    const float* const next_k = chunk.decayed_k + (t + 1) * chunk.key_size;
    const float* const decays = chunk.decay + t * chunk.decay_size;
    vf decay = splat(decays[0]);
    const vf beta = splat(chunk.beta[t]);
    vf correction[N], out[N];
    Sums<N> next{};
    for (int j = 0; j < N; ++j) {
        const vf v = load(chunk.v + t * BLOCK + j * W), found = sums.found[j];
        correction[j] = (CHANNELS ? v - found : fused(-decay, found, v)) * beta;
        out[j] = vf{};
    }
    for (int64_t i = 0; i < key_dim; ++i) {
        float* const row = state + i * stride;
        const vf key = splat(k[i]), query = splat(q[i]), next_key = splat(NEXT ? next_k[i] : 0.0f);
        if (CHANNELS) decay = splat(decays[i]);
        for (int j = 0; j < N; ++j) {
            const vf s = fused(key, correction[j], decay * load(row + j * W));
            store(row + j * W, s);
            out[j] = fused(query, s, out[j]);
            if (NEXT) next.found[j] = fused(next_key, s, next.found[j]);
        }
    }
    for (int j = 0; j < N; ++j) store(chunk.out + t * BLOCK + j * W, out[j]);
    return next;
}

template <int N, bool CHANNELS>
void run_tokens(float* state, int64_t stride, const Chunk& chunk, int64_t tokens, int64_t key_dim) {
    Sums<N> sums = find<N>(state, stride, chunk.decayed_k, key_dim);
    for (int64_t t = 0; t + 1 < tokens; ++t) {
        sums = update<N, CHANNELS, true>(state, stride, chunk, t, key_dim, sums);
    }
    update<N, CHANNELS, false>(state, stride, chunk, tokens - 1, key_dim, sums);
}

using RunTokens = void (*)(float* state, int64_t stride, const Chunk&, int64_t tokens, int64_t key_dim);

RunTokens runner(int64_t vectors, bool channels) {
    if (vectors == 1) return channels ? run_tokens<1, true> : run_tokens<1, false>;
    if (vectors == 2) return channels ? run_tokens<2, true> : run_tokens<2, false>;
    return channels ? run_tokens<WIDE, true> : run_tokens<WIDE, false>;
}

void copy_columns(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns,
                  bool pad) {
    for (int64_t i = 0; i < rows; ++i, from += from_stride, to += to_stride) {
        memcpy(to, from, static_cast<size_t>(columns) * 4);
        if (pad) memset(to + columns, 0, static_cast<size_t>(round_up(columns, W) - columns) * 4);
    }
}

// Columns of the next block: as many vectors as there is a function for, the last one may be a part.
int64_t block_width(int64_t columns) {
    const int64_t vectors = round_up(columns, W) / W;
    return smaller(columns, (vectors >= WIDE ? WIDE : vectors >= 2 ? 2 : 1) * W);
}

// Columns [column, column + width) of a chunk.
template <class T>
void run_block(const DeltaArgs& args, float* state, int64_t head, int64_t column, int64_t width, int64_t first,
               int64_t tokens, const Chunk& chunk) {
    const T* v = reinterpret_cast<const T*>(args.v) + head * args.v_head_stride + column;
    for (int64_t t = 0; t < tokens; ++t) {
        widen(v + (first + t) * args.v_token_stride, width, 1.0f, chunk.v + t * BLOCK);
    }
    const RunTokens run = runner(round_up(width, W) / W, args.channels);
    if (tokens <= IN_PLACE && width % W == 0) {
        run(state + column, args.value_dim, chunk, tokens, args.key_dim);
    } else {
        copy_columns(state + column, args.value_dim, chunk.block, BLOCK, args.key_dim, width, true);
        run(chunk.block, BLOCK, chunk, tokens, args.key_dim);
        copy_columns(chunk.block, BLOCK, state + column, args.value_dim, args.key_dim, width, false);
    }
    T* out = reinterpret_cast<T*>(args.out) + (first * args.value_heads + head) * args.value_dim + column;
    for (int64_t t = 0; t < tokens; ++t) {
        narrow(chunk.out + t * BLOCK, width, out + t * args.value_heads * args.value_dim);
    }
}

template <class T>
void run_head(T*, const DeltaArgs& args, const RecurrentTask& task, int64_t head, const Chunk& chunk) {
    const auto state_of = [&](int64_t slot) {
        return args.state + slot * args.slot_stride + head * args.key_dim * args.value_dim;
    };
    float* const state = state_of(task.slot);
    const int64_t columns = task.part_end - task.part_begin;
    if (task.fresh) {
        for (int64_t i = 0; i < args.key_dim; ++i) {
            memset(state + i * args.value_dim + task.part_begin, 0, static_cast<size_t>(columns) * 4);
        }
    }
    for_chunks(
        task, CHUNK,
        [&](int64_t first, int64_t last) {
            prepare<T>(args, head, first, last, chunk);
            for (int64_t column = task.part_begin, width; column < task.part_end; column += width) {
                width = block_width(task.part_end - column);
                run_block<T>(args, state, head, column, width, first, last - first, chunk);
            }
        },
        [&](int64_t slot) {
            copy_columns(state + task.part_begin, args.value_dim, state_of(slot) + task.part_begin, args.value_dim,
                         args.key_dim, columns, false);
        });
}

} // namespace

int64_t delta_scratch(const DeltaArgs& args) {
    const int64_t key_size = round_up(args.key_dim, 16);
    return 4 * (round_up(args.key_dim * BLOCK, 16) + CHUNK * (4 * key_size + 2 * BLOCK + 2));
}

void delta(const DeltaArgs& args, const RecurrentTask& task, char* scratch) {
    const Chunk chunk = chunk_at(args, scratch);
    for (int64_t head = task.unit_begin; head < task.unit_end; ++head) {
        with_type(args.dtype, [&](auto* type) { run_head(type, args, task, head, chunk); });
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
