// Attention on bfloat16 where the processor multiplies pairs of it into float32 (vdpbf16ps). Two kernels with one
// arithmetic, so that a query row's result is bitwise the same from either:
//
//   score[key]  = one chain over the pairs of dims: s = s + q[2p] k[2p] + q[2p+1] k[2p+1]
//   top         = max(top, max over the block of score * unit), unit = scale * log2(e)
//   P[key]      = 2^(score * unit - top) by a short polynomial, rounded to bfloat16
//   acc[d]      = acc[d] * 2^(old top - top), then one chain over the pairs of keys with P and V
//   total       = the same as a column of V that is 1 everywhere: the rounded weights are normalised exactly
//
//   few rows (decode): lanes are keys for the scores and dims for the values. Keys are transposed 16 at a time on the
//     way from memory, values are used as they come; a task takes several KV heads, which lie side by side in memory.
//   many rows (prefill, rows that share a prefix): lanes are query rows throughout, so neither keys nor values need be
//     transposed and softmax needs no sums across lanes. Queries are transposed once per task, outputs at its end. Up
//     to four groups of 64 rows take turns with each block.
//
//   block of <= 64 keys:   S[key][row] = K Q^T   ->   hide, top, P[key pair][row]   ->   acc[d][row] += V^T P
//
// Rounding P costs up to 2^-9 of each weight, at random; the output is rounded to bfloat16 (2^-9) anyway.
#include "attention_rows.hpp"
#include "int8_rows.hpp"

namespace pando {
namespace PANDO_LEVEL {

#if defined(__AVX512BF16__)

namespace {

constexpr int64_t KEYS = ATTENTION_KEY_BLOCK;
constexpr int64_t KEY_PAIRS = KEYS / 2;
constexpr int64_t ROWS = ATTENTION_QUERY_ROWS; // of the wide kernel at once
constexpr int64_t MAX_HEAD_DIM = 1024;
constexpr float LOG2_E = 1.44269504088896f;

typedef __m512bh Pairs; // 16 pairs

inline Pairs load_pairs(const void* p) {
    Pairs x;
    memcpy(&x, p, sizeof x);
    return x;
}
inline Pairs broadcast(const uint32_t* p) { return reinterpret_cast<Pairs>(_mm512_set1_epi32(static_cast<int>(*p))); }
inline vf add_products(vf total, Pairs a, Pairs b) { return _mm512_dpbf16_ps(total, a, b); }

inline __m512i load_words(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i load_words(const void* p, int64_t n) { // the first n <= 32 of 16 bits each, then zeros
    return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p);
}

inline void store_words(void* p, __m512i x, int64_t n) { // the first n, of 32 at most
    _mm512_mask_storeu_epi16(p, n >= 32 ? ~0u : (1u << n) - 1, x);
}

// What sums of weighted values are multiplied by in the end.
inline vf factor_of(vf total) { return select(total == vf{}, vf{}, 1.0f / total); }

// For _mm512_permutexvar_epi16: number i of the low half beside number i of the high half.
inline __m512i halves_woven() {
    uint16_t order[32];
    for (int i = 0; i < 16; ++i) {
        order[2 * i] = static_cast<uint16_t>(i);
        order[2 * i + 1] = static_cast<uint16_t>(16 + i);
    }
    return load_words(order);
}

// 2^x within 3 units in the last place of float32 for x <= 0 (and a little above); 2^-inf is 0, NaN stays.
inline vf power_of_two(vf x) {
    const vf r = _mm512_reduce_ps(x, 0x09); // x - floor(x); 0 for infinities
    vf y = splat(0.0018671300495043397f);
    y = _mm512_fmadd_ps(y, r, splat(0.009017030708491802f));
    y = _mm512_fmadd_ps(y, r, splat(0.05579991266131401f));
    y = _mm512_fmadd_ps(y, r, splat(0.24016444385051727f));
    y = _mm512_fmadd_ps(y, r, splat(0.6931512951850891f));
    y = _mm512_fmadd_ps(y, r, splat(1.0f)); // exactly 1 at 0: an unchanged top shrinks nothing
    return _mm512_scalef_ps(y, x);
}

// The same within 2^-13 of the result: of weights, which are rounded to bfloat16.
inline vf weight_of(vf x) {
    const vf r = _mm512_reduce_ps(x, 0x09);
    vf y = splat(0.0782679701723141f);
    y = _mm512_fmadd_ps(y, r, splat(0.2263076822786962f));
    y = _mm512_fmadd_ps(y, r, splat(0.6954243475489896f));
    y = _mm512_fmadd_ps(y, r, splat(1.0f));
    return _mm512_scalef_ps(y, x);
}

// What scores are multiplied by before they are powers of two. Softcapped scores are brought there by soften().
float unit_of(const AttentionArgs& args) { return args.softcap > 0.0f ? 1.0f : args.scale * LOG2_E; }

// One copy for both kernels: the compiler may contract products and sums differently in two.
__attribute__((noinline)) void soften(const AttentionArgs& args, float* scores, int64_t n) {
    const float in = args.scale / args.softcap, out = args.softcap * LOG2_E;
    for (int64_t i = 0; i < n; i += W) store(scores + i, vtanh(load(scores + i) * in) * out);
}

// Transposes 16 rows of 16 pairs: out[pair * stride + row]. Pieces of 128 bits come straight from memory.
inline void transpose(const char* const* rows, int64_t offset, uint32_t* out, int64_t stride) {
    for (int c = 0; c < 4; ++c) {
        __m512 z[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto piece = [&](int row) __attribute__((always_inline)) {
                return _mm_loadu_ps(reinterpret_cast<const float*>(rows[row] + offset) + c * 4);
            };
            z[i] = _mm512_castps128_ps512(piece(i));
            z[i] = _mm512_insertf32x4(z[i], piece(i + 4), 1);
            z[i] = _mm512_insertf32x4(z[i], piece(i + 8), 2);
            z[i] = _mm512_insertf32x4(z[i], piece(i + 12), 3);
        }
        const __m512 a = _mm512_unpacklo_ps(z[0], z[1]), b = _mm512_unpackhi_ps(z[0], z[1]);
        const __m512 d = _mm512_unpacklo_ps(z[2], z[3]), e = _mm512_unpackhi_ps(z[2], z[3]);
        const auto put = [&](int pair, __m512d x)
                             __attribute__((always_inline)) { _mm512_storeu_pd(out + (c * 4 + pair) * stride, x); };
        put(0, _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(d)));
        put(1, _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(d)));
        put(2, _mm512_unpacklo_pd(_mm512_castps_pd(b), _mm512_castps_pd(e)));
        put(3, _mm512_unpackhi_pd(_mm512_castps_pd(b), _mm512_castps_pd(e)));
    }
}

// Rows of `dim` elements each as out[pair * stride + row], zero-padded to whole pairs.
void transpose_rows(const char* const* rows, int64_t dim, uint32_t* out, int64_t stride) {
    int64_t i = 0;
    for (; i + 32 <= dim; i += 32) transpose(rows, i * 2, out + i / 2 * stride, stride);
    if (i == dim) return;
    uint32_t padded[16][16], turned[16][16];
    const char* pointers[16];
    for (int row = 0; row < 16; ++row) {
        _mm512_storeu_si512(padded[row], load_words(rows[row] + i * 2, dim - i));
        pointers[row] = reinterpret_cast<const char*>(padded[row]);
    }
    transpose(pointers, 0, turned[0], 16);
    for (int64_t pair = 0; pair < (dim - i + 1) / 2; ++pair) {
        memcpy(out + (i / 2 + pair) * stride, turned[pair], sizeof turned[pair]);
    }
}

// Everything a task keeps. Sizes are padded to whole vectors; a pair takes 32 bits.
struct Pad {
    const QueryRow* info; // [rows]
    int64_t rows, pairs, value_size;
    Spots<bf16> here, next;     // [KEYS] of this block and of the one after it; all valid pointers
    Spots<int8_t> here8, next8; // instead of them in an int8 cache
    const bf16* zeros;          // as long as a row of keys or values
};

// Walks the blocks of a task: keys, values of the block at hand and of the one after it.
struct Walk {
    const AttentionArgs& args;
    const AttentionTask& task;
    Pad& pad;

    int64_t block_end(int64_t begin) const { return smaller(begin + KEYS, part_end(task, begin)); }

    // Fills `next` for the block at `begin`; past the end it repeats this block's, whose fetching is free.
    template <class T>
    bool find(int64_t begin, const Spots<T>& here, const Spots<T>& next) {
        int64_t n = 0;
        if (begin < task.key_end) {
            n = block_end(begin) - begin;
            if (!locate(args, task, begin, begin + n, next)) return false;
        }
        for (; n < KEYS; ++n) {
            next.keys[n] = n > 0 ? next.keys[n - 1] : here.keys[0];
            next.values[n] = n > 0 ? next.values[n - 1] : here.values[0];
        }
        return true;
    }

    bool find(int64_t begin) {
        return args.int8_kv ? find(begin, pad.here8, pad.next8) : find(begin, pad.here, pad.next);
    }

    bool advance(int64_t end) {
        exchange(pad.here, pad.next);
        exchange(pad.here8, pad.next8);
        return find(end);
    }
};

inline void fetch(const bf16* row, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 32) __builtin_prefetch(row + i, 0, 3);
}
inline void fetch(const int8_t* row, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 64) __builtin_prefetch(row + i, 0, 3);
    __builtin_prefetch(row + dim + 3, 0, 3); // rows begin anywhere in a line
}

inline void fetch_to_write(const void* p) { // what every processor with AVX-512 has, but no flag above says so
    __asm__ volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
}

// Elements [i, i + 32) of an int8 row of n as bfloat16; those past its end are 0.
inline __m512i expand_words(const int8_t* row, int64_t i, int64_t n, vf scale) {
    const __m256i bytes = n - i >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i))
                                      : _mm256_maskz_loadu_epi8((1u << (n - i)) - 1, row + i);
    const vf low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const vf high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high * scale, low * scale));
}

// A row of int8 as bfloat16, to `out`, which has room for whole vectors of 32.
inline void expand_pairs(const int8_t* row, int64_t n, void* out) {
    const vf scale = splat(int8_scale(row, n));
    for (int64_t i = 0; i < n; i += 32) {
        _mm512_storeu_si512(static_cast<char*>(out) + i * 2, expand_words(row, i, n, scale));
    }
}

bool first_part(const AttentionTask& task, int64_t begin) {
    return !task.split || begin / ATTENTION_SPLIT == task.first_part;
}

// ---- few rows ----

struct Few {
    uint32_t* queries; // [heads][rows][pairs]
    float* acc;        // [heads][rows][value_size]
    float* top;        // [heads][rows]
    float* total;      // [heads][rows]
    float* scores;     // [heads][rows][KEYS]
    uint32_t* weights; // [heads][rows][KEY_PAIRS]
    float* shrink;     // [heads][rows]
    // Of an int8 cache: 16 tokens' keys or values, expanded.
    bf16* wide;             // [heads][16][wide_size]
    const bf16** wide_rows; // [KEYS]: where row n of a block lies, for the first head
    int64_t wide_size;
};

int64_t wide_size_of(const AttentionArgs& args) { return round_up(larger(args.head_dim, args.v_dim), 32); }

// Dims (2c, 2c+1) of 32 come out of two unpacks as halves of 128-bit lanes; these put them in order.
inline void write_halves(float* out, vf low, vf high) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    store(out, _mm512_permutex2var_ps(low, first, high));
    store(out + W, _mm512_permutex2var_ps(low, second, high));
}

// Keys or values are visited 16 tokens at a time, some heads of them and then the next heads. What comes later is
// fetched meanwhile, a little with every step: a core has room for some twenty fetches, and while it has none it does
// not multiply either.
struct Ahead {
    const bf16* const* rows; // of tokens, `count` of them
    int64_t offset, dim;     // of the elements to fetch
    int64_t count, steps;    // in which to do it
    int64_t row, due;        // tokens done; those that should be, times `steps`

    void step() {
        for (due += count; row < count && row * steps < due; ++row) fetch(rows[row] + offset, dim);
    }
};

// How far ahead, in numbers of heads that are worked on together.
constexpr int64_t DISTANCE = 3;

// What comes DISTANCE times `heads` heads after `head` of the 16 tokens from n, in `steps` steps.
Ahead ahead_of(const bf16* const* rows, const bf16* const* next, int64_t n, int64_t count, int64_t head, int64_t heads,
               int64_t all, int64_t offset, int64_t stride, int64_t dim, int64_t steps) {
    head += DISTANCE * heads;
    while (head >= all) {
        head -= all;
        n += 16;
    }
    if (n >= count) {
        n = (n - round_up(count, 16)) & (KEYS - 16);
        rows = next;
    }
    const int64_t wanted = smaller(heads, all - head);
    return {rows + n, offset + head * stride, (wanted - 1) * stride + dim, 16, steps, 0, 0};
}

// What nothing of the task would fetch: the first `units` heads, 16 tokens after the other.
void fetch_first(const bf16* const* rows, int64_t units, int64_t heads, int64_t offset, int64_t stride, int64_t dim) {
    const int64_t tokens = smaller(KEYS, (units + heads - 1) / heads * 16);
    for (int64_t n = 0; n < tokens; ++n) fetch(rows[n] + offset, (smaller(units, heads) - 1) * stride + dim);
}

// Keys or values of 16 tokens and all heads of an int8 cache, in the order in which they lie in memory; fetches those
// of the 16 tokens after them. (Head by head, as below, it waits for memory: neighbouring heads share lines.)
void expand_tokens(const Few& few, const int8_t* const* tokens, const int8_t* const* next, int64_t n, int64_t count,
                   int64_t heads, int64_t offset, int64_t stride, int64_t dim) {
    const int8_t* const* ahead = n + 16 < count ? tokens + n + 16 : next;
    for (int64_t i = 0; i < 16; ++i) {
        fetch(ahead[i] + offset, (heads - 1) * stride + dim);
        const int8_t* row = tokens[n + i] + offset;
        for (int64_t head = 0; head < heads; ++head) {
            expand_pairs(row + head * stride, dim, few.wide + (head * 16 + i) * few.wide_size);
        }
    }
}

// 4 pairs of 16 rows, which lie `stride` bytes on in all of them, as [pair][row]. Pieces of 128 bits come straight from
// memory.
inline void turn(const char* const* rows, int64_t offset, Pairs (&out)[4]) {
    __m512 z[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const auto piece = [&](int row) __attribute__((always_inline)) {
            return _mm_loadu_ps(reinterpret_cast<const float*>(rows[row] + offset));
        };
        z[i] = _mm512_castps128_ps512(piece(i));
        z[i] = _mm512_insertf32x4(z[i], piece(i + 4), 1);
        z[i] = _mm512_insertf32x4(z[i], piece(i + 8), 2);
        z[i] = _mm512_insertf32x4(z[i], piece(i + 12), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1]));
    const __m512d d = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3]));
    const __m512d e = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
    out[0] = reinterpret_cast<Pairs>(_mm512_unpacklo_pd(a, d));
    out[1] = reinterpret_cast<Pairs>(_mm512_unpackhi_pd(a, d));
    out[2] = reinterpret_cast<Pairs>(_mm512_unpacklo_pd(b, e));
    out[3] = reinterpret_cast<Pairs>(_mm512_unpackhi_pd(b, e));
}

// 16 keys of a head each, with the queries [rows][pairs] and scores [rows][KEYS] that belong to them.
struct Scored {
    const uint32_t* queries;
    float* scores;
    const char* keys[16];
};

// R query rows of N heads, or of N times 16 keys.
template <int R, int N>
void score_few(const AttentionArgs& args, const Scored* each, int64_t pairs, Ahead& ahead) {
    vf total[N][R] = {};
    const auto add = [&](int n, const char* const* keys, int64_t offset, int64_t pair, int64_t count)
                         __attribute__((always_inline)) {
                             Pairs turned[4];
                             turn(keys, offset, turned);
#pragma GCC unroll 4
                             for (int p = 0; p < 4; ++p) {
                                 if (p >= count) break;
#pragma GCC unroll 8
                                 for (int r = 0; r < R; ++r) {
                                     const Pairs query = broadcast(each[n].queries + r * pairs + pair + p);
                                     total[n][r] = add_products(total[n][r], query, turned[p]);
                                 }
                             }
                         };
    int64_t pair = 0;
    for (; 2 * pair + 8 <= args.head_dim; pair += 4) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) add(n, each[n].keys, pair * 4, pair, 4);
        ahead.step();
    }
    if (const int64_t rest = args.head_dim - 2 * pair; rest > 0) {
        uint64_t padded[16][2] = {};
        const char* rows[16];
        for (int row = 0; row < 16; ++row) rows[row] = reinterpret_cast<const char*>(padded[row]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
            for (int row = 0; row < 16; ++row) {
                memcpy(padded[row], each[n].keys[row] + pair * 4, static_cast<size_t>(rest) * 2);
            }
            add(n, rows, 0, pair, pairs - pair);
        }
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store(each[n].scores + r * KEYS, total[n][r]);
    }
}

template <int N>
void score_few(const AttentionArgs& args, const Pad& pad, const Scored* each, Ahead& ahead) {
    static_assert(ATTENTION_JOINT_ROWS == 8, "one kernel for each number of rows");
    switch (pad.rows) {
    case 1: return score_few<1, N>(args, each, pad.pairs, ahead);
    case 2: return score_few<2, N>(args, each, pad.pairs, ahead);
    case 3: return score_few<3, N>(args, each, pad.pairs, ahead);
    case 4: return score_few<4, N>(args, each, pad.pairs, ahead);
    case 5: return score_few<5, N>(args, each, pad.pairs, ahead);
    case 6: return score_few<6, N>(args, each, pad.pairs, ahead);
    case 7: return score_few<7, N>(args, each, pad.pairs, ahead);
    default: return score_few<8, N>(args, each, pad.pairs, ahead);
    }
}

// The products of all heads' queries with a block's keys. Two heads at a time, or 2 x 16 keys of the only one, have
// sums enough to hide the latency of an addition.
void score_block(const AttentionArgs& args, const AttentionTask& task, const Pad& pad, const Few& few, int64_t count) {
    const int64_t heads = task.kv_head_end - task.kv_head_begin, stride = args.k_head_stride;
    const int64_t offset = task.kv_head_begin * stride, steps = larger(1, args.head_dim / 8);
    const bool wide = args.int8_kv;
    const auto scored = [&](int64_t head, int64_t n) {
        Scored one{few.queries + head * pad.rows * pad.pairs, few.scores + head * pad.rows * KEYS + n, {}};
        for (int i = 0; i < 16; ++i) {
            const bf16* row =
                wide ? few.wide + (head * 16 + i) * few.wide_size : pad.here.keys[n + i] + offset + head * stride;
            one.keys[i] = reinterpret_cast<const char*>(row);
        }
        return one;
    };
    const auto after = [&](int64_t head, int64_t together, int64_t n) {
        return wide ? Ahead{}
                    : ahead_of(pad.here.keys, pad.next.keys, n, count, head, together, heads, offset, stride,
                               args.head_dim, steps);
    };
    for (int64_t n = 0, tokens = 16; n < count; n += tokens) {
        if (wide) expand_tokens(few, pad.here8.keys, pad.next8.keys, n, count, heads, offset, stride, args.head_dim);
        if (heads == 1 && !wide && n + 16 < count) {
            tokens = 32;
            const Scored each[2] = {scored(0, n), scored(0, n + 16)};
            Ahead ahead{pad.next.keys + n, offset, args.head_dim, 32, steps, 0, 0};
            score_few<2>(args, pad, each, ahead);
            continue;
        }
        tokens = 16;
        for (int64_t head = 0, together; head < heads; head += together) {
            together = smaller(2, heads - head);
            Ahead ahead = after(head, together, n);
            const Scored each[2] = {scored(head, n), scored(head + together - 1, n)};
            if (together == 2) {
                score_few<2>(args, pad, each, ahead);
            } else {
                score_few<1>(args, pad, each, ahead);
            }
        }
    }
}

// Scores of a row become weights; lanes of keys the row does not see, and those beyond the block, weigh nothing.
void weigh_few(const AttentionArgs& args, const Seen& seen, float* scores, float unit, float& top, float& shrink,
               uint32_t* weights) {
    if (args.softcap > 0.0f) soften(args, scores, KEYS);
    vf s[4];
    vf best = splat(HIDDEN);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const int64_t first = seen.first - c * W, end = seen.end - c * W;
        uint32_t mask = end >= W ? 0xffffu : end <= 0 ? 0u : (1u << end) - 1;
        if (first > 0) mask = first >= W ? 0u : mask >> first << first;
        s[c] = _mm512_mask_blend_ps(static_cast<__mmask16>(mask), splat(HIDDEN), load(scores + c * W));
    }
    if (seen.own < seen.end) {
        float kept[KEYS];
        memcpy(kept, s, sizeof kept);
        for (int64_t n = seen.own; n < seen.end; ++n) {
            if (seen.mask[n - seen.own] == 0) kept[n] = HIDDEN;
        }
        memcpy(s, kept, sizeof kept);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) best = _mm512_max_ps(s[c], best);
    const float largest = _mm512_reduce_max_ps(best) * unit;
    const float now = largest > top ? largest : top;
    const float base = now == HIDDEN ? 0.0f : now;
    shrink = power_of_two(splat(top - base))[0];
    top = now;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) s[c] = weight_of(_mm512_fmsub_ps(s[c], splat(unit), splat(base)));
    for (int c = 0; c < 4; c += 2) {
        const Pairs two = _mm512_cvtne2ps_pbh(s[c + 1], s[c]);
        memcpy(weights + c * 8, &two, sizeof two);
    }
}

// Of one head: pairs of keys [begin, end) of a block of `count` keys.
struct Mix {
    float* acc;              // [rows][value_size]
    float* total;            // [rows]
    const uint32_t* weights; // [rows][KEY_PAIRS]
    const float* shrink;     // [rows]
    const bf16* const* rows; // [KEYS]
    int64_t offset;          // of the head's values in a row
    int64_t begin, end, count;
};

// acc[r][32 C dims from i] for R rows; `rest` of the last 32 exist.
template <int R, int C, bool WHOLE>
void mix_few(const Pad& pad, const Mix& mix, int64_t m, int64_t i, int64_t rest, Ahead& ahead) {
    vf total[R][2 * C], sum[R];
    const Pairs ones = reinterpret_cast<Pairs>(_mm512_set1_epi32(0x3f803f80));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const float shrink = mix.begin == 0 ? mix.shrink[m + r] : 1.0f;
        const float* row = mix.acc + (m + r) * pad.value_size + i;
        sum[r] = splat(mix.total[m + r]) * shrink;
#pragma GCC unroll 8
        for (int c = 0; c < 2 * C; ++c) total[r][c] = load(row + c * W) * shrink;
    }
    for (int64_t j = mix.begin; j < mix.end; ++j) {
        const bf16* one = mix.rows[2 * j] + mix.offset + i;
        const bf16* two = 2 * j + 1 < mix.count ? mix.rows[2 * j + 1] + mix.offset + i : pad.zeros;
        Pairs weight[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            weight[r] = broadcast(mix.weights + (m + r) * KEY_PAIRS + j);
            sum[r] = add_products(sum[r], weight[r], ones);
        }
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const __m512i a = WHOLE ? load_words(one + c * 32) : load_words(one, rest);
            const __m512i b = WHOLE ? load_words(two + c * 32) : load_words(two, rest);
            const Pairs low = reinterpret_cast<Pairs>(_mm512_unpacklo_epi16(a, b));
            const Pairs high = reinterpret_cast<Pairs>(_mm512_unpackhi_epi16(a, b));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                total[r][2 * c] = add_products(total[r][2 * c], weight[r], low);
                total[r][2 * c + 1] = add_products(total[r][2 * c + 1], weight[r], high);
            }
        }
        ahead.step();
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        float* row = mix.acc + (m + r) * pad.value_size + i;
#pragma GCC unroll 8
        for (int c = 0; c < 2 * C; ++c) store(row + c * W, total[r][c]);
        // Every piece of a row computes the same total; the last one's is kept, when no other needs the old one.
        if (i + 32 * C >= pad.value_size) mix.total[m + r] = sum[r][0];
    }
}

template <int R>
void mix_few(const Pad& pad, const Mix& mix, int64_t m, int64_t v_dim, Ahead& ahead) {
    constexpr int C = R > 2 ? 2 : 4;
    int64_t i = 0;
    for (; i + 32 * C <= v_dim; i += 32 * C) mix_few<R, C, true>(pad, mix, m, i, 0, ahead);
    for (; i + 32 <= v_dim; i += 32) mix_few<R, 1, true>(pad, mix, m, i, 0, ahead);
    if (i < v_dim) mix_few<R, 1, false>(pad, mix, m, i, v_dim - i, ahead);
}

void mix_few(const Pad& pad, const Mix& mix, int64_t v_dim, Ahead& ahead) {
    int64_t m = 0;
    for (; m + 4 <= pad.rows; m += 4) mix_few<4>(pad, mix, m, v_dim, ahead);
    for (; m + 2 <= pad.rows; m += 2) mix_few<2>(pad, mix, m, v_dim, ahead);
    if (m < pad.rows) mix_few<1>(pad, mix, m, v_dim, ahead);
}

void start_few(const AttentionArgs& args, const Pad& pad, const Few& few, int64_t kv_head, int64_t at, bool first) {
    memset(few.acc + at * pad.value_size, 0, static_cast<size_t>(pad.rows * pad.value_size) * 4);
    for (int64_t m = 0; m < pad.rows; ++m) {
        const bool sink = args.sinks != nullptr && first;
        few.top[at + m] = sink ? args.sinks[kv_head * group_size(args) + pad.info[m].lane] * LOG2_E : HIDDEN;
        few.total[at + m] = sink ? 1.0f : 0.0f;
    }
}

void weigh_block(const AttentionArgs& args, const Pad& pad, const Few& few, int64_t heads, int64_t begin,
                 int64_t count) {
    const float unit = unit_of(args);
    for (int64_t m = 0; m < pad.rows; ++m) {
        const Seen seen = seen_by(args, pad.info[m], begin, count);
        for (int64_t at = m; at < heads * pad.rows; at += pad.rows) {
            weigh_few(args, seen, few.scores + at * KEYS, unit, few.top[at], few.shrink[at],
                      few.weights + at * KEY_PAIRS);
        }
    }
}

void block_few(const AttentionArgs& args, const AttentionTask& task, const Pad& pad, const Few& few, int64_t begin,
               int64_t count) {
    const int64_t heads = task.kv_head_end - task.kv_head_begin, stride = args.v_head_stride;
    score_block(args, task, pad, few, count);
    weigh_block(args, pad, few, heads, begin, count);
    const int64_t first = task.kv_head_begin * stride;
    for (int64_t j = 0; 2 * j < count; j += 8) { // values in the same order as keys
        if (args.int8_kv) {
            expand_tokens(few, pad.here8.values, pad.next8.values, 2 * j, count, heads, first, stride, args.v_dim);
        }
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t at = head * pad.rows;
            Ahead ahead{}; // nothing
            if (!args.int8_kv) {
                ahead = ahead_of(pad.here.values, pad.next.values, 2 * j, count, head, 1, heads, first, stride,
                                 args.v_dim, 8);
            }
            const Mix mix{few.acc + at * pad.value_size,
                          few.total + at,
                          few.weights + at * KEY_PAIRS,
                          few.shrink + at,
                          args.int8_kv ? few.wide_rows : pad.here.values,
                          args.int8_kv ? head * 16 * few.wide_size : first + head * stride,
                          j,
                          smaller(j + 8, (count + 1) / 2),
                          count};
            mix_few(pad, mix, args.v_dim, ahead);
        }
    }
}

void write_few(bf16* out, const float* acc, float total, int64_t n) {
    const vf factor = factor_of(splat(total));
    for (int64_t i = 0; i < n; i += 32) {
        const Pairs two = _mm512_cvtne2ps_pbh(load(acc + i + W) * factor, load(acc + i) * factor);
        store_words(out + i, reinterpret_cast<__m512i>(two), n - i);
    }
}

void finish_few(const AttentionArgs& args, const AttentionTask& task, const Pad& pad, const Few& few, int64_t kv_head,
                int64_t at, int64_t part, float* partials) {
    for (int64_t m = 0; m < pad.rows; ++m) {
        float* acc = few.acc + (at + m) * pad.value_size;
        for (int64_t i = 0; i < pad.value_size; i += 2 * W) write_halves(acc + i, load(acc + i), load(acc + i + W));
        if (!task.split) {
            write_few(out_row<bf16>(args, pad.info[m], kv_head), acc, few.total[at + m], args.v_dim);
            continue;
        }
        float* entry = entry_of(args, task, pad.info[m], kv_head, part, partials);
        entry[0] = few.top[at + m];
        entry[1] = few.total[at + m];
        memcpy(entry + 16, acc, static_cast<size_t>(round_up(args.v_dim, ATTENTION_VALUE_PAD)) * 4);
    }
}

bool attend_few(const AttentionArgs& args, const AttentionTask& task, Pad& pad, char* scratch, float* partials) {
    const int64_t heads = task.kv_head_end - task.kv_head_begin, all = heads * pad.rows;
    Few few;
    few.queries = reinterpret_cast<uint32_t*>(carve(scratch, all * pad.pairs * 4));
    few.acc = reinterpret_cast<float*>(carve(scratch, all * pad.value_size * 4));
    few.top = reinterpret_cast<float*>(carve(scratch, all * 4));
    few.total = reinterpret_cast<float*>(carve(scratch, all * 4));
    few.scores = reinterpret_cast<float*>(carve(scratch, all * KEYS * 4));
    few.weights = reinterpret_cast<uint32_t*>(carve(scratch, all * KEY_PAIRS * 4));
    few.shrink = reinterpret_cast<float*>(carve(scratch, all * 4));
    few.wide_size = wide_size_of(args);
    few.wide = reinterpret_cast<bf16*>(carve(scratch, heads * 16 * few.wide_size * 2));
    few.wide_rows = reinterpret_cast<const bf16**>(carve(scratch, KEYS * 8));
    for (int64_t n = 0; n < KEYS; ++n) few.wide_rows[n] = few.wide + n % 16 * few.wide_size;
    Walk walk{args, task, pad};
    if (!walk.find(task.key_begin)) return false;
    if (!args.int8_kv) {
        const int64_t k_offset = task.kv_head_begin * args.k_head_stride;
        const int64_t v_offset = task.kv_head_begin * args.v_head_stride;
        fetch_first(pad.next.keys, 2 * DISTANCE, heads, k_offset, args.k_head_stride, args.head_dim);
        fetch_first(pad.next.values, DISTANCE, heads, v_offset, args.v_head_stride, args.v_dim);
    }
    for (int64_t at = 0; at < all; ++at) {
        const QueryRow& row = pad.info[at % pad.rows];
        const int64_t head = (task.kv_head_begin + at / pad.rows) * group_size(args) + row.lane;
        uint32_t* query = few.queries + at * pad.pairs;
        query[pad.pairs - 1] = 0;
        memcpy(query,
               reinterpret_cast<const bf16*>(args.q) + row.token * args.q_token_stride + head * args.q_head_stride,
               static_cast<size_t>(args.head_dim) * 2);
    }
    int64_t part = task.key_begin;
    for (int64_t begin = task.key_begin, end; begin < task.key_end; begin = end) {
        end = walk.block_end(begin);
        if (!walk.advance(end)) return false;
        const bool last = end == part_end(task, part);
        for (int64_t head = 0; head < heads && begin == part; ++head) {
            start_few(args, pad, few, task.kv_head_begin + head, head * pad.rows, first_part(task, begin));
        }
        block_few(args, task, pad, few, begin, end - begin);
        for (int64_t head = 0; head < heads && last; ++head) {
            finish_few(args, task, pad, few, task.kv_head_begin + head, head * pad.rows, part, partials);
        }
        if (last) part = end;
    }
    return true;
}

// ---- many rows ----

// V vectors of query rows. Every array that holds rows is [..][V * 16]. Groups of rows share the keys and values of a
// block, one after the other.
struct Many {
    uint32_t* queries; // [pairs][rows]
    uint32_t* keys;    // [KEYS][stride], as in the cache
    uint32_t* values;  // [KEY_PAIRS][value_size]
    float* scores;     // [KEYS][rows]
    uint32_t* weights; // [KEY_PAIRS][rows]
    float* acc;        // [value_size][rows]
    float* top;        // [rows]
    float* total;
    float* shrink;
};

// A group's positions: what it sees of a block.
struct Reach {
    int32_t first, last, own;

    bool nothing(const AttentionArgs& args, int64_t begin, int64_t end) const {
        return args.tree_mask == nullptr && (begin > last || (args.window > 0 && first + 1 - args.window >= end));
    }
    bool all(const AttentionArgs& args, int64_t begin, int64_t end) const {
        return end <= (args.tree_mask != nullptr ? own : first + 1) &&
               (args.window <= 0 || last + 1 - begin <= args.window);
    }
};

Reach reach_of(const Pad& pad) {
    Reach reach{pad.info[0].position, pad.info[0].position, pad.info[0].member->own};
    for (int64_t m = 1; m < pad.rows; ++m) {
        const QueryRow& row = pad.info[m];
        if (row.position < reach.first) reach.first = row.position;
        if (row.position > reach.last) reach.last = row.position;
        if (row.member->own < reach.own) reach.own = row.member->own;
    }
    return reach;
}

// Rows of keys are this many pairs apart in scratch: constants, so that one register addresses several.
int64_t key_stride(const AttentionArgs& args) {
    return args.head_dim <= 128 ? 64 : args.head_dim <= 256 ? 128 : MAX_HEAD_DIM / 2;
}

// How many keys (or value dims) meet V vectors of rows at once: 16 or 24 sums in registers hide the latency.
constexpr int tile_of(int vectors) { return vectors == 1 ? 16 : vectors == 4 ? 4 : 8; }

void copy_keys(const AttentionArgs& args, const Pad& pad, int64_t offset, int64_t count, int64_t stride, uint32_t* to) {
    for (int64_t n = 0; n < count; ++n) {
        if (args.int8_kv) {
            fetch(pad.next8.keys[n] + offset, args.head_dim);
            expand_pairs(pad.here8.keys[n] + offset, args.head_dim, to + n * stride);
            continue;
        }
        const bf16* from = pad.here.keys[n] + offset;
        for (int64_t i = 0; i < args.head_dim; i += 32) {
            _mm512_storeu_si512(to + n * stride + i / 2, load_words(from + i, args.head_dim - i));
        }
    }
}

void pair_values(const AttentionArgs& args, const Pad& pad, int64_t offset, int64_t count, uint32_t* to) {
    __m512i first, second;
    {
        uint16_t order[64];
        for (int i = 0; i < 32; ++i) {
            order[2 * i] = static_cast<uint16_t>(i);
            order[2 * i + 1] = static_cast<uint16_t>(32 + i);
        }
        memcpy(&first, order, 64);
        memcpy(&second, order + 32, 64);
    }
    const auto weave = [&](int64_t j, int64_t i, __m512i a, __m512i b) __attribute__((always_inline)) {
        uint32_t* out = to + j * pad.value_size + i;
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
        _mm512_storeu_si512(out + W, _mm512_permutex2var_epi16(a, second, b));
    };
    for (int64_t j = 0; 2 * j < count; ++j) {
        const bool both = 2 * j + 1 < count;
        if (args.int8_kv) {
            const int8_t* one = pad.here8.values[2 * j] + offset;
            const int8_t* two = pad.here8.values[2 * j + 1] + offset; // weighs nothing past the end of the block
            fetch(pad.next8.values[2 * j] + offset, args.v_dim);
            fetch(pad.next8.values[2 * j + 1] + offset, args.v_dim);
            const vf s = splat(int8_scale(one, args.v_dim)), t = splat(int8_scale(two, args.v_dim));
            for (int64_t i = 0; i < args.v_dim; i += 32) {
                weave(j, i, expand_words(one, i, args.v_dim, s), expand_words(two, i, args.v_dim, t));
            }
            continue;
        }
        const bf16* one = pad.here.values[2 * j] + offset;
        const bf16* two = both ? pad.here.values[2 * j + 1] + offset : pad.zeros;
        for (int64_t i = 0; i < args.v_dim; i += 32) {
            weave(j, i, load_words(one + i, args.v_dim - i), load_words(both ? two + i : two, args.v_dim - i));
        }
    }
}

// From key[s] of a block on, the first s + 1 vectors of rows see nothing: there they are left out. Later queries see
// more keys, so those that are left stand at the end.
template <int V>
struct Bounds {
    int64_t key[V];

    explicit Bounds(int64_t count) {
        for (int v = 0; v < V; ++v) key[v] = count;
    }

    Bounds(const AttentionArgs& args, const Pad& pad, int64_t begin, int64_t count) {
        int64_t end = 0;
        for (int64_t m = 0; m < V * W; ++m) {
            if (m < pad.rows) end = larger(end, seen_by(args, pad.info[m], begin, count).end);
            key[m / W] = end;
        }
    }
};

template <int N>
struct Vectors {
    static constexpr int n = N;
};

// step(Vectors<U>, begin, end) for the keys that the last U vectors see, U = V and less.
template <int V, int U = V, class Step>
inline void by_vectors(const Bounds<V>& bounds, int64_t unit, int64_t begin, const Step& step) {
    const int64_t end = larger(begin, (bounds.key[V - U] + unit - 1) / unit);
    step(Vectors<U>{}, begin, end);
    if constexpr (U > 1) by_vectors<V, U - 1>(bounds, unit, end, step);
}

template <int V, int STRIDE>
void score_many(const Many& many, int64_t pairs, const Bounds<V>& bounds, Ahead ahead) {
    constexpr int N = tile_of(V);
    by_vectors(bounds, N, 0, [&](auto vectors, int64_t begin, int64_t end) __attribute__((always_inline)) {
        constexpr int U = vectors.n;
        // The last tile may look at keys of the block before: never read.
        for (int64_t n = begin * N; n < end * N; n += N) {
            const uint32_t* key = many.keys + n * STRIDE;
            const uint32_t* query = many.queries + (V - U) * W;
            vf total[N][U] = {};
            for (int64_t p = 0; p < pairs; ++p, ++key, query += V * W) {
                Pairs q[U];
#pragma GCC unroll 4
                for (int v = 0; v < U; ++v) q[v] = load_pairs(query + v * W);
#pragma GCC unroll 16
                for (int i = 0; i < N; ++i) {
                    const Pairs k = broadcast(key + i * STRIDE);
#pragma GCC unroll 4
                    for (int v = 0; v < U; ++v) total[i][v] = add_products(total[i][v], q[v], k);
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
                for (int v = 0; v < U; ++v) store(many.scores + ((n + i) * V + V - U + v) * W, total[i][v]);
            }
            ahead.step();
        }
    });
}

// Scores of keys a row does not see become HIDDEN.
template <int V>
void hide_many(const AttentionArgs& args, const Pad& pad, const Many& many, int64_t begin, int64_t count) {
    alignas(64) int32_t first[V * W], end[V * W];
    int64_t all_begin = 0, all_end = count; // keys between these are seen by all
    for (int64_t m = 0; m < V * W; ++m) {
        const Seen seen = seen_by(args, pad.info[smaller(m, pad.rows - 1)], begin, count);
        first[m] = static_cast<int32_t>(seen.first);
        end[m] = static_cast<int32_t>(larger(0, seen.end));
        all_begin = larger(all_begin, seen.first);
        all_end = smaller(all_end, end[m]);
        for (int64_t n = seen.own; n < seen.end; ++n) {
            if (seen.mask[n - seen.own] == 0) many.scores[n * V * W + m] = HIDDEN;
        }
    }
    for (int64_t n = all_begin > 0 ? 0 : all_end; n < count; ++n) {
        if (n == all_begin && n < all_end) n = all_end;
        if (n >= count) break;
        const __m512i key = _mm512_set1_epi32(static_cast<int>(n));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __mmask16 hidden = _mm512_cmpgt_epi32_mask(_mm512_load_si512(first + v * W), key) |
                                     _mm512_cmple_epi32_mask(_mm512_load_si512(end + v * W), key);
            _mm512_mask_storeu_ps(many.scores + (n * V + v) * W, hidden, splat(HIDDEN));
        }
    }
}

template <int V>
void weigh_many(const AttentionArgs& args, const Many& many, int64_t count) {
    const vf unit = splat(unit_of(args));
    const Pairs ones = reinterpret_cast<Pairs>(_mm512_set1_epi32(0x3f803f80));
    const __m512i woven = halves_woven();
    vf base[V], total[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        vf best[2] = {splat(HIDDEN), splat(HIDDEN)};
        for (int64_t n = 0; n < count; ++n)
            best[n & 1] = _mm512_max_ps(load(many.scores + (n * V + v) * W), best[n & 1]);
        const vf largest = _mm512_max_ps(best[0], best[1]) * unit, top = load(many.top + v * W);
        const vf now = select(largest > top, largest, top);
        base[v] = select(now == splat(HIDDEN), vf{}, now);
        const vf shrink = power_of_two(top - base[v]);
        total[v] = load(many.total + v * W) * shrink;
        store(many.top + v * W, now);
        store(many.shrink + v * W, shrink);
    }
    for (int64_t j = 0; 2 * j < count; ++j) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const float* at = many.scores + (2 * j * V + v) * W;
            const vf a = weight_of(_mm512_fmsub_ps(load(at), unit, base[v]));
            const vf b = 2 * j + 1 < count ? weight_of(_mm512_fmsub_ps(load(at + V * W), unit, base[v])) : vf{};
            const __m512i two = _mm512_permutexvar_epi16(woven, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
            _mm512_storeu_si512(many.weights + (j * V + v) * W, two);
            total[v] = add_products(total[v], reinterpret_cast<Pairs>(two), ones);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(many.total + v * W, total[v]);
}

template <int V>
void mix_many(const Many& many, int64_t value_size, int64_t v_dim, const Bounds<V>& bounds, Ahead ahead) {
    constexpr int N = tile_of(V);
    vf shrink[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) shrink[v] = load(many.shrink + v * W);
    for (int64_t i = 0; i < v_dim; i += N) {
        float* acc = many.acc + i * V * W;
        vf total[N][V];
#pragma GCC unroll 16
        for (int d = 0; d < N; ++d) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) total[d][v] = load(acc + (d * V + v) * W) * shrink[v];
        }
        const uint32_t* value = many.values + i;
        const uint32_t* weight = many.weights;
        by_vectors(bounds, 2, 0, [&](auto vectors, int64_t begin, int64_t end) __attribute__((always_inline)) {
            constexpr int U = vectors.n;
            for (int64_t j = begin; j < end; ++j, value += value_size, weight += V * W) {
                Pairs p[U];
#pragma GCC unroll 4
                for (int v = 0; v < U; ++v) p[v] = load_pairs(weight + (V - U + v) * W);
#pragma GCC unroll 16
                for (int d = 0; d < N; ++d) {
                    const Pairs x = broadcast(value + d);
#pragma GCC unroll 4
                    for (int v = 0; v < U; ++v) total[d][V - U + v] = add_products(total[d][V - U + v], p[v], x);
                }
            }
        });
#pragma GCC unroll 16
        for (int d = 0; d < N; ++d) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) store(acc + (d * V + v) * W, total[d][v]);
        }
        ahead.step();
    }
}

template <int V>
void start_many(const AttentionArgs& args, const Pad& pad, const Many& many, int64_t kv_head, bool first) {
    memset(many.acc, 0, static_cast<size_t>(pad.value_size * V * W) * 4);
    const bool sink = args.sinks != nullptr && first;
    for (int64_t m = 0; m < V * W; ++m) {
        const bool real = m < pad.rows && sink;
        many.top[m] = real ? args.sinks[kv_head * group_size(args) + pad.info[m].lane] * LOG2_E : HIDDEN;
        many.total[m] = real ? 1.0f : 0.0f;
    }
}

const bf16* query_of(const AttentionArgs& args, const QueryRow& row, int64_t kv_head) {
    return reinterpret_cast<const bf16*>(args.q) + row.token * args.q_token_stride +
           (kv_head * group_size(args) + row.lane) * args.q_head_stride;
}

template <int V>
void copy_queries_many(const AttentionArgs& args, const Pad& pad, const Many& many, int64_t kv_head,
                       const bf16* zeros) {
    for (int64_t m = 0; m < V * W; m += 16) {
        const char* rows[16];
        for (int64_t i = 0; i < 16; ++i) {
            const bf16* row = zeros;
            if (m + i < pad.rows) row = query_of(args, pad.info[m + i], kv_head);
            rows[i] = reinterpret_cast<const char*>(row);
        }
        transpose_rows(rows, args.head_dim, many.queries + m, V * W);
    }
}

// The rows' outputs: rounded first, so that pairs of dims are turned. Their lines are fetched meanwhile: stores wait
// for theirs one after the other.
template <int V>
void write_many(const AttentionArgs& args, const Pad& pad, const Many& many, int64_t kv_head) {
    const __m512i woven = halves_woven();
    uint32_t* turned = reinterpret_cast<uint32_t*>(many.scores); // which are done with
    const int64_t pairs = pad.value_size / 2;
    for (int64_t m = 0; m < pad.rows; m += W) {
        const vf factor = factor_of(load(many.total + m));
        const int64_t rows = smaller(W, pad.rows - m);
        bf16* out[W];
        for (int64_t r = 0; r < rows; ++r) {
            out[r] = out_row<bf16>(args, pad.info[m + r], kv_head);
            for (int64_t i = 0; i < args.v_dim; i += 32) fetch_to_write(out[r] + i);
        }
        for (int64_t i = 0; i < args.v_dim; i += 32) {
            uint32_t straight[16][16];
            const char* pointers[16];
            for (int p = 0; p < 16; ++p) {
                const float* acc = many.acc + (i + 2 * p) * V * W + m;
                const vf low = load(acc) * factor, high = load(acc + V * W) * factor;
                const __m512i two = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(straight[p], _mm512_permutexvar_epi16(woven, two));
                pointers[p] = reinterpret_cast<const char*>(straight[p]);
            }
            transpose(pointers, 0, turned + i / 2, pairs);
        }
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < args.v_dim; i += 32) {
                store_words(out[r] + i, load_words(turned + r * pairs + i / 2), args.v_dim - i);
            }
        }
    }
}

template <int V>
void finish_many(const AttentionArgs& args, const AttentionTask& task, const Pad& pad, const Many& many,
                 int64_t kv_head, int64_t part, float* partials) {
    if (!task.split) return write_many<V>(args, pad, many, kv_head);
    // The scores are done with; 16 rows of them take 16 rows of the output.
    uint32_t* turned = reinterpret_cast<uint32_t*>(many.scores);
    const int64_t size = round_up(args.v_dim, ATTENTION_VALUE_PAD);
    for (int64_t m = 0; m < pad.rows; m += 16) {
        for (int64_t i = 0; i < size; i += 16) {
            const char* rows[16];
            for (int d = 0; d < 16; ++d) rows[d] = reinterpret_cast<const char*>(many.acc + (i + d) * V * W + m);
            transpose(rows, 0, turned + i, size);
        }
        for (int64_t r = m; r < smaller(m + 16, pad.rows); ++r) {
            const float* acc = reinterpret_cast<const float*>(turned) + (r - m) * size;
            float* entry = entry_of(args, task, pad.info[r], kv_head, part, partials);
            entry[0] = many.top[r];
            entry[1] = many.total[r];
            memcpy(entry + 16, acc, static_cast<size_t>(size) * 4);
        }
    }
}

// What a group's work on a block fetches meanwhile of the block after it: its share of the keys and values.
struct Share {
    int64_t number, of;

    Ahead ahead(const bf16* const* rows, int64_t offset, int64_t dim, int64_t steps) const {
        const int64_t begin = KEYS * number / of, end = KEYS * (number + 1) / of;
        return {rows + begin, offset, dim, end - begin, steps, 0, 0};
    }
};

template <int V>
void block_many(const AttentionArgs& args, const Pad& pad, const Many& many, int64_t kv_head, int64_t begin,
                int64_t count, bool hide, Share share) {
    constexpr int N = tile_of(V);
    Ahead keys{}, values{}; // rows of an int8 cache are fetched as they are expanded
    if (!args.int8_kv) {
        keys = share.ahead(pad.next.keys, kv_head * args.k_head_stride, args.head_dim, (count + N - 1) / N);
        values = share.ahead(pad.next.values, kv_head * args.v_head_stride, args.v_dim, (args.v_dim + N - 1) / N);
    }
    const Bounds<V> bounds = hide ? Bounds<V>(args, pad, begin, count) : Bounds<V>(count);
    const int64_t stride = key_stride(args);
    if (stride == 64) {
        score_many<V, 64>(many, pad.pairs, bounds, keys);
    } else if (stride == 128) {
        score_many<V, 128>(many, pad.pairs, bounds, keys);
    } else {
        score_many<V, MAX_HEAD_DIM / 2>(many, pad.pairs, bounds, keys);
    }
    if (args.softcap > 0.0f) soften(args, many.scores, count * V * W);
    if (hide) hide_many<V>(args, pad, many, begin, count);
    weigh_many<V>(args, many, count);
    mix_many<V>(many, pad.value_size, args.v_dim, bounds, values);
}

// step(Vectors<N>) with as many as `rows` fill.
template <class Step>
void with_vectors(int64_t rows, const Step& step) {
    switch ((rows + W - 1) / W) {
    case 1: return step(Vectors<1>{});
    case 2: return step(Vectors<2>{});
    case 3: return step(Vectors<3>{});
    default: return step(Vectors<4>{});
    }
}

// Up to ATTENTION_TASK_ROWS rows, ROWS at a time, of one KV head.
bool attend_groups(const AttentionArgs& args, const AttentionTask& task, Pad& pad, const Many& first, int64_t kv_head,
                   float* partials) {
    constexpr int64_t MOST = ATTENTION_TASK_ROWS / ROWS;
    const int64_t stride = key_stride(args), all = pad.rows, groups = (all + ROWS - 1) / ROWS;
    const QueryRow* info = pad.info;
    Reach reach[MOST];
    const auto each = [&](const auto& step) {
        for (int64_t g = 0; g < groups; ++g) {
            Many many = first;
            many.queries += g * pad.pairs * ROWS;
            many.acc += g * pad.value_size * ROWS;
            many.top += g * ROWS;
            many.total += g * ROWS;
            pad.info = info + g * ROWS;
            pad.rows = smaller(ROWS, all - g * ROWS);
            with_vectors(pad.rows, [&](auto vectors) { step(vectors, many, reach[g]); });
        }
        pad.info = info;
        pad.rows = all;
    };
    Walk walk{args, task, pad};
    if (!walk.find(task.key_begin)) return false;
    const int64_t k_offset = kv_head * args.k_head_stride, v_offset = kv_head * args.v_head_stride;
    for (int64_t n = 0; n < KEYS && !args.int8_kv; ++n) {
        fetch(pad.next.keys[n] + k_offset, args.head_dim);
        fetch(pad.next.values[n] + v_offset, args.v_dim);
    }
    each([&](auto vectors, const Many& many, Reach& mine) {
        const int64_t after = pad.info - info + ROWS;
        for (int64_t m = after; m < smaller(after + ROWS, all); ++m) {
            fetch(query_of(args, info[m], kv_head), args.head_dim);
        }
        copy_queries_many<vectors.n>(args, pad, many, kv_head, pad.zeros);
        mine = reach_of(pad);
    });
    int64_t part = task.key_begin;
    for (int64_t begin = task.key_begin, end; begin < task.key_end; begin = end) {
        end = walk.block_end(begin);
        if (!walk.advance(end)) return false;
        const int64_t count = end - begin;
        const bool last = end == part_end(task, part);
        copy_keys(args, pad, k_offset, count, stride, first.keys);
        pair_values(args, pad, v_offset, count, first.values);
        Share share{0, 0};
        for (int64_t g = 0; g < groups; ++g) share.of += reach[g].nothing(args, begin, end) ? 0 : 1;
        each([&](auto vectors, const Many& many, const Reach& mine) {
            constexpr int V = vectors.n;
            if (begin == part) start_many<V>(args, pad, many, kv_head, first_part(task, begin));
            if (!mine.nothing(args, begin, end)) {
                block_many<V>(args, pad, many, kv_head, begin, count, !mine.all(args, begin, end), share);
                ++share.number;
            }
            if (last) finish_many<V>(args, task, pad, many, kv_head, part, partials);
        });
        if (last) part = end;
    }
    return true;
}

// One query of a group of more heads than a task's rows is done piece by piece.
bool attend_all(const AttentionArgs& args, const AttentionTask& task, Pad& pad, char* scratch, float* partials) {
    const QueryRow* info = pad.info;
    const int64_t all = pad.rows, most = round_up(smaller(all, ATTENTION_TASK_ROWS), ROWS);
    Many many;
    many.queries = reinterpret_cast<uint32_t*>(carve(scratch, pad.pairs * most * 4));
    many.keys = reinterpret_cast<uint32_t*>(carve(scratch, KEYS * key_stride(args) * 4));
    many.values = reinterpret_cast<uint32_t*>(carve(scratch, KEY_PAIRS * pad.value_size * 4));
    many.scores = reinterpret_cast<float*>(carve(scratch, larger(KEYS * ROWS, 16 * pad.value_size) * 4));
    many.weights = reinterpret_cast<uint32_t*>(carve(scratch, KEY_PAIRS * ROWS * 4));
    many.acc = reinterpret_cast<float*>(carve(scratch, pad.value_size * most * 4));
    many.top = reinterpret_cast<float*>(carve(scratch, most * 4));
    many.total = reinterpret_cast<float*>(carve(scratch, most * 4));
    many.shrink = reinterpret_cast<float*>(carve(scratch, ROWS * 4));
    for (int64_t kv_head = task.kv_head_begin; kv_head < task.kv_head_end; ++kv_head) {
        for (int64_t m = 0; m < all; m += ATTENTION_TASK_ROWS) {
            pad.info = info + m;
            pad.rows = smaller(ATTENTION_TASK_ROWS, all - m);
            if (!attend_groups(args, task, pad, many, kv_head, partials)) return false;
        }
    }
    return true;
}

} // namespace

bool attention_in_pairs(const AttentionArgs& args) {
    return args.dtype == DType::bf16 && args.head_dim <= MAX_HEAD_DIM && args.scale > 0.0f;
}

int64_t attention_pairs_scratch(const AttentionArgs& args) {
    const int64_t pairs = (args.head_dim + 1) / 2, value_size = round_up(args.v_dim, 2 * W);
    const int64_t most = ATTENTION_TASK_ROWS, rows = larger(most, group_size(args)), few = ATTENTION_JOINT_ROWS,
                  all = few * args.kv_heads;
    const int64_t pad = rows * int64_t{sizeof(QueryRow)} + 9 * KEYS * 8 + larger(value_size, args.head_dim) * 2 +
                        args.kv_heads * 16 * wide_size_of(args) * 2;
    const int64_t decode = all * (pairs + value_size + KEY_PAIRS + KEYS + 3);
    const int64_t blocks = (pairs + value_size + 3) * most + KEYS * key_stride(args) + KEY_PAIRS * value_size +
                           larger(KEYS * ROWS, 16 * value_size) + KEY_PAIRS * ROWS;
    return pad + larger(decode, blocks) * 4 + 26 * 64;
}

bool attend_pairs(const AttentionArgs& args, const AttentionTask& task, char* scratch, float* partials) {
    Pad pad;
    pad.rows = count_rows(args, task);
    pad.pairs = (args.head_dim + 1) / 2;
    pad.value_size = round_up(args.v_dim, 2 * W);
    QueryRow* info = reinterpret_cast<QueryRow*>(carve(scratch, pad.rows * int64_t{sizeof(QueryRow)}));
    list_rows(args, task, info);
    pad.info = info;
    pad.here = carve_spots<bf16>(scratch);
    pad.next = carve_spots<bf16>(scratch);
    pad.here8 = carve_spots<int8_t>(scratch);
    pad.next8 = carve_spots<int8_t>(scratch);
    const int64_t zeros = larger(pad.value_size, args.head_dim) * 2;
    char* zero = carve(scratch, zeros);
    memset(zero, 0, static_cast<size_t>(zeros));
    pad.zeros = reinterpret_cast<const bf16*>(zero);
    if (pad.rows <= ATTENTION_JOINT_ROWS) return attend_few(args, task, pad, scratch, partials);
    return attend_all(args, task, pad, scratch, partials);
}

#else

bool attention_in_pairs(const AttentionArgs&) { return false; }
int64_t attention_pairs_scratch(const AttentionArgs&) { return 0; }
bool attend_pairs(const AttentionArgs&, const AttentionTask&, char*, float*) { return false; }

#endif

} // namespace PANDO_LEVEL
} // namespace pando
