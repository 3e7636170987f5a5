// Paged attention: one task is a few consecutive queries of one row, all query heads of one KV head or of all of them.
// Keys are visited in blocks; softmax is computed online (Milakov, Gimelshein 2018), its state kept per query row:
//
//   block of <= 64 keys:  scores[M][64] = Q K^T  ->  hide, softcap  ->  max, exp, sum  ->  acc[M][Dv] = acc * a + P V
//
// A query row m of a KV head is (query m / group, head m % group of its group). Every row's arithmetic depends on its
// own keys only, in an order fixed by their positions, so results are the same for any number of threads.
#include "leaves.hpp"
#include "simd.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

constexpr int64_t KEYS = ATTENTION_KEY_BLOCK;
constexpr int TILE_ROWS = W == 16 ? 4 : 2; // TILE_ROWS * 4 accumulators stay in registers
constexpr int64_t POINTERS = KEYS * int64_t{sizeof(void*)};
constexpr float HIDDEN = -__builtin_inff();

// How queries and keys of one element type are multiplied: `step` elements at a time into float32 lanes.
template <class T>
struct Dot {
    using Query = float; // as kept in scratch
    using Chunk = vf;
    static constexpr int step = W;
    static Chunk query(const Query* p) { return load(p); }
    static Chunk key(const T* p) { return load(p); }
    static Chunk key_first(const T* p, int64_t n) { return load_first(p, n); }
    static vf add(vf total, Chunk a, Chunk b) { return total + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bf16> {
    using Query = bf16;
    using Chunk = __m512bh;
    static constexpr int step = 2 * W;
    static Chunk query(const bf16* p) {
        Chunk x;
        memcpy(&x, p, sizeof x);
        return x;
    }
    static Chunk key(const bf16* p) { return query(p); }
    static Chunk key_first(const bf16* p, int64_t n) {
        bf16 lanes[step];
        memset(lanes, 0, sizeof lanes);
        memcpy(lanes, p, static_cast<size_t>(n) * sizeof(bf16));
        return query(lanes);
    }
    static vf add(vf total, Chunk a, Chunk b) { return _mm512_dpbf16_ps(total, a, b); }
};
#endif

// Everything a task keeps for one KV head while it walks its keys.
template <class T>
struct Work {
    using Query = typename Dot<T>::Query;
    int64_t kv_head;
    int64_t rows, query_size, value_size; // sizes padded to whole vectors
    Query* queries;                       // [rows][query_size]
    float* acc;                           // [rows][value_size]
    float* top;                           // [rows] largest score so far
    float* total;                         // [rows] sum of exp(score - top)
    float* scores;                        // [rows][KEYS] of this block, shared by the heads, as all below
    float* shrink;                        // [rows] what acc is to be multiplied by before this block is added
    const T** keys;                       // [KEYS] of KV head 0
    const T** values;
    const T** next_keys; // [KEYS] of the block after it
    const T** next_values;

    // The work of the head n heads after this one.
    Work of(int64_t n) const {
        Work other = *this;
        other.kv_head += n;
        other.queries += n * rows * query_size;
        other.acc += n * rows * value_size;
        other.top += n * rows;
        other.total += n * rows;
        return other;
    }
};

int64_t group_size(const AttentionArgs& args) { return args.heads / args.kv_heads; }

char* carve(char*& scratch, int64_t bytes) {
    char* piece = scratch;
    scratch += round_up(bytes, 64);
    return piece;
}

template <class T>
Work<T> make_work(const AttentionArgs& args, const AttentionTask& task, char* scratch) {
    using Query = typename Work<T>::Query;
    Work<T> work;
    work.kv_head = task.kv_head_begin;
    work.rows = (task.query_end - task.query_begin) * group_size(args);
    work.query_size = round_up(args.head_dim, Dot<T>::step);
    work.value_size = round_up(args.v_dim, ATTENTION_VALUE_PAD);
    const int64_t all = work.rows * (task.kv_head_end - task.kv_head_begin);
    work.queries = reinterpret_cast<Query*>(carve(scratch, all * work.query_size * int64_t{sizeof(Query)}));
    work.acc = reinterpret_cast<float*>(carve(scratch, all * work.value_size * 4));
    work.top = reinterpret_cast<float*>(carve(scratch, all * 4));
    work.total = reinterpret_cast<float*>(carve(scratch, all * 4));
    work.scores = reinterpret_cast<float*>(carve(scratch, work.rows * KEYS * 4));
    work.shrink = reinterpret_cast<float*>(carve(scratch, work.rows * 4));
    work.keys = reinterpret_cast<const T**>(carve(scratch, POINTERS));
    work.values = reinterpret_cast<const T**>(carve(scratch, POINTERS));
    work.next_keys = reinterpret_cast<const T**>(carve(scratch, POINTERS));
    work.next_values = reinterpret_cast<const T**>(carve(scratch, POINTERS));
    return work;
}

void copy_query(float* to, const float* from, int64_t n) { memcpy(to, from, static_cast<size_t>(n) * 4); }
[[maybe_unused]] void copy_query(bf16* to, const bf16* from, int64_t n) {
    memcpy(to, from, static_cast<size_t>(n) * 2);
}
template <class T>
void copy_query(float* to, const T* from, int64_t n) {
    for_row(
        n, [&](int64_t i) { store(to + i, load(from + i)); },
        [&](int64_t i, int64_t rest) { store_first(to + i, load_first(from + i, rest), rest); });
}

// The sink is one more score that every query sees first; only the first part of a split row counts it.
template <class T>
void start(const AttentionArgs& args, const AttentionTask& task, const Work<T>& work) {
    const int64_t group = group_size(args);
    memset(work.queries, 0, static_cast<size_t>(work.rows * work.query_size) * sizeof(*work.queries));
    memset(work.acc, 0, static_cast<size_t>(work.rows * work.value_size) * 4);
    for (int64_t m = 0; m < work.rows; ++m) {
        const int64_t head = work.kv_head * group + m % group;
        const T* q = reinterpret_cast<const T*>(args.q) + (task.query_begin + m / group) * args.q_token_stride +
                     head * args.q_head_stride;
        copy_query(work.queries + m * work.query_size, q, args.head_dim);
        const bool sink = args.sinks != nullptr && task.part == 0;
        work.top[m] = sink ? args.sinks[head] : HIDDEN;
        work.total[m] = sink ? 1.0f : 0.0f;
    }
}

// The rows of a token's KV heads [begin, end), `stride` elements apart.
template <class T>
void prefetch(const T* token, int64_t stride, int64_t begin, int64_t end, int64_t n) {
    for (int64_t head = begin; head < end; ++head) {
        const char* p = reinterpret_cast<const char*>(token + head * stride);
        for (int64_t i = 0; i < n * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(p + i, 0, 2);
    }
}

// Finds the keys and values of positions [begin, end), at most KEYS, for the next block and starts fetching them: they
// are scattered, so the processor can not foresee them. False if the page table leaves the cache.
template <class T>
bool look_ahead(const AttentionArgs& args, const AttentionTask& task, int64_t begin, int64_t end, Work<T>& work) {
    const int32_t* pages = args.page_table + task.row * args.table_stride;
    const T* k = reinterpret_cast<const T*>(args.k);
    const T* v = reinterpret_cast<const T*>(args.v);
    int64_t page = begin / args.page_size, offset = begin % args.page_size, n = 0;
    for (int64_t position = begin; position < end; ++page, offset = 0) {
        const int64_t first = pages[page] * args.page_size;
        const int64_t count = smaller(args.page_size - offset, end - position);
        if (first < 0 || first + offset + count > args.num_slots) return false;
        for (int64_t i = 0; i < count; ++i, ++n) {
            work.next_keys[n] = k + (first + offset + i) * args.k_slot_stride;
            work.next_values[n] = v + (first + offset + i) * args.v_slot_stride;
            prefetch(work.next_keys[n], args.k_head_stride, task.kv_head_begin, task.kv_head_end, args.head_dim);
            prefetch(work.next_values[n], args.v_head_stride, task.kv_head_begin, task.kv_head_end, args.v_dim);
        }
        position += count;
    }
    for (; n % 4 != 0; ++n) work.next_keys[n] = work.next_keys[n - 1]; // scored with the last tile, hidden afterwards
    return true;
}

template <class P>
void exchange(P& a, P& b) {
    const P kept = a;
    a = b;
    b = kept;
}

template <class T, int ROWS>
void score_tile(const Work<T>& work, int64_t head_offset, int64_t head_dim, int64_t m, int64_t n) {
    using D = Dot<T>;
    const typename D::Query* q = work.queries + m * work.query_size;
    const T* const keys[4] = {work.keys[n] + head_offset, work.keys[n + 1] + head_offset,
                              work.keys[n + 2] + head_offset, work.keys[n + 3] + head_offset};
    vf total[ROWS][4] = {};
    const auto add = [&](int64_t i, typename D::Chunk k0, typename D::Chunk k1, typename D::Chunk k2,
                         typename D::Chunk k3) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const typename D::Chunk x = D::query(q + r * work.query_size + i);
            total[r][0] = D::add(total[r][0], x, k0);
            total[r][1] = D::add(total[r][1], x, k1);
            total[r][2] = D::add(total[r][2], x, k2);
            total[r][3] = D::add(total[r][3], x, k3);
        }
    };
    int64_t i = 0;
    for (; i + D::step <= head_dim; i += D::step) {
        add(i, D::key(keys[0] + i), D::key(keys[1] + i), D::key(keys[2] + i), D::key(keys[3] + i));
    }
    if (const int64_t rest = head_dim - i; rest > 0) {
        add(i, D::key_first(keys[0] + i, rest), D::key_first(keys[1] + i, rest), D::key_first(keys[2] + i, rest),
            D::key_first(keys[3] + i, rest));
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        const v4 four = sums(total[r][0], total[r][1], total[r][2], total[r][3]);
        memcpy(work.scores + (m + r) * KEYS + n, &four, sizeof four);
    }
}

template <class T>
void score(const AttentionArgs& args, const Work<T>& work, int64_t count) {
    const int64_t offset = work.kv_head * args.k_head_stride, head_dim = args.head_dim;
    for (int64_t n = 0; n < count; n += 4) {
        int64_t m = 0;
        for (; m + TILE_ROWS <= work.rows; m += TILE_ROWS) score_tile<T, TILE_ROWS>(work, offset, head_dim, m, n);
        if (TILE_ROWS > 2 && m + 2 <= work.rows) {
            score_tile<T, 2>(work, offset, head_dim, m, n);
            m += 2;
        }
        if (m < work.rows) score_tile<T, 1>(work, offset, head_dim, m, n);
    }
}

// Scale, softcap and hide one row of scores; returns the largest.
float finish_scores(const AttentionArgs& args, float* scores, int64_t first_seen, int64_t end_seen, int64_t padded) {
    vf best = splat(HIDDEN);
    for (int64_t n = 0; n < padded; n += W) {
        vf s = load(scores + n) * args.scale;
        if (args.softcap > 0.0f) s = args.softcap * vtanh(s * (1.0f / args.softcap));
        if (n < first_seen || n + W > end_seen) {
            for (int lane = 0; lane < W; ++lane) {
                if (n + lane < first_seen || n + lane >= end_seen) s[lane] = HIDDEN;
            }
        }
        best = vmax(s, best);
        store(scores + n, s);
    }
    return max_lane(best);
}

// Scores become softmax weights relative to the running maximum; total and shrink are brought up to date.
template <class T>
void weigh(const AttentionArgs& args, const AttentionTask& task, const Work<T>& work, int64_t begin, int64_t count) {
    const int64_t group = group_size(args), padded = round_up(count, W);
    for (int64_t m = 0; m < work.rows; ++m) {
        float* scores = work.scores + m * KEYS;
        const int64_t position = task.first_position + m / group;
        const int64_t end_seen = smaller(count, position + 1 - begin);
        const int64_t first_seen = args.window > 0 ? larger(0, position + 1 - args.window - begin) : 0;
        if (end_seen <= first_seen) { // this query sees none of the block
            work.shrink[m] = 1.0f;
            memset(scores, 0, static_cast<size_t>(padded) * 4);
            continue;
        }
        const float best = finish_scores(args, scores, first_seen, end_seen, padded);
        const float top = best > work.top[m] ? best : work.top[m];
        vf added{};
        for (int64_t n = 0; n < padded; n += W) {
            const vf weight = vexp(load(scores + n) - top);
            added += weight;
            store(scores + n, weight);
        }
        work.shrink[m] = top == work.top[m] ? 1.0f : vexp(splat(work.top[m] - top))[0];
        work.total[m] = work.total[m] * work.shrink[m] + sum(added);
        work.top[m] = top;
    }
}

// acc[m..m+ROWS][i..i+VECTORS*W] = acc * shrink + weights * values; `rest` < W elements of the last vector exist.
template <class T, int ROWS, int VECTORS, bool WHOLE>
void mix_tile(const Work<T>& work, int64_t head_offset, int64_t m, int64_t i, int64_t count, int64_t rest) {
    vf total[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < VECTORS; ++c) {
            total[r][c] = load(work.acc + (m + r) * work.value_size + i + c * W) * work.shrink[m + r];
        }
    }
    for (int64_t n = 0; n < count; ++n) {
        const T* source = work.values[n] + head_offset + i;
        vf value[VECTORS];
#pragma GCC unroll 4
        for (int c = 0; c < VECTORS; ++c) {
            value[c] = WHOLE ? load(source + c * W) : load_first(source, rest);
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const float weight = work.scores[(m + r) * KEYS + n];
#pragma GCC unroll 4
            for (int c = 0; c < VECTORS; ++c) total[r][c] += value[c] * weight;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < VECTORS; ++c) store(work.acc + (m + r) * work.value_size + i + c * W, total[r][c]);
    }
}

template <class T, int ROWS>
void mix_rows(const Work<T>& work, int64_t head_offset, int64_t m, int64_t v_dim, int64_t count) {
    int64_t i = 0;
    for (; i + 4 * W <= v_dim; i += 4 * W) mix_tile<T, ROWS, 4, true>(work, head_offset, m, i, count, 0);
    for (; i + W <= v_dim; i += W) mix_tile<T, ROWS, 1, true>(work, head_offset, m, i, count, 0);
    if (i < v_dim) mix_tile<T, ROWS, 1, false>(work, head_offset, m, i, count, v_dim - i);
}

template <class T>
void mix(const AttentionArgs& args, const Work<T>& work, int64_t count) {
    const int64_t offset = work.kv_head * args.v_head_stride, v_dim = args.v_dim;
    int64_t m = 0;
    for (; m + TILE_ROWS <= work.rows; m += TILE_ROWS) mix_rows<T, TILE_ROWS>(work, offset, m, v_dim, count);
    if (TILE_ROWS > 2 && m + 2 <= work.rows) {
        mix_rows<T, 2>(work, offset, m, v_dim, count);
        m += 2;
    }
    if (m < work.rows) mix_rows<T, 1>(work, offset, m, v_dim, count);
}

template <class T>
void write_row(T* out, const float* acc, float total, int64_t n) {
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    for_row(
        n, [&](int64_t i) { store(out + i, load(acc + i) * factor); },
        [&](int64_t i, int64_t rest) { store_first(out + i, load_first(acc + i, rest) * factor, rest); });
}

// Output of query row m, counted over the task's heads: [heads][rows].
template <class T>
T* out_row(const AttentionArgs& args, const AttentionTask& task, int64_t m) {
    const int64_t group = group_size(args), rows = (task.query_end - task.query_begin) * group;
    const int64_t head = (task.kv_head_begin + m / rows) * group + m % group;
    return reinterpret_cast<T*>(args.out) + ((task.query_begin + m % rows / group) * args.heads + head) * args.v_dim;
}

// A part leaves top, total and acc of its rows at its place: [all], [all], [all][value_size].
template <class T>
void write_out(const AttentionArgs& args, const AttentionTask& task, const Work<T>& work, float* partials) {
    const int64_t all = work.rows * (task.kv_head_end - task.kv_head_begin);
    if (task.num_parts > 1) {
        float* place = partials + task.partial;
        memcpy(place, work.top, static_cast<size_t>(all) * 4);
        memcpy(place + all, work.total, static_cast<size_t>(all) * 4);
        memcpy(place + 2 * all, work.acc, static_cast<size_t>(all * work.value_size) * 4);
        return;
    }
    for (int64_t m = 0; m < all; ++m) {
        write_row(out_row<T>(args, task, m), work.acc + m * work.value_size, work.total[m], args.v_dim);
    }
}

template <class T>
bool attend_as(const AttentionArgs& args, const AttentionTask& task, char* scratch, float* partials) {
    Work<T> work = make_work<T>(args, task, scratch);
    const int64_t heads = task.kv_head_end - task.kv_head_begin;
    for (int64_t head = 0; head < heads; ++head) start(args, task, work.of(head));
    if (!look_ahead(args, task, task.key_begin, smaller(task.key_begin + KEYS, task.key_end), work)) return false;
    for (int64_t begin = task.key_begin; begin < task.key_end; begin += KEYS) {
        const int64_t end = smaller(begin + KEYS, task.key_end);
        exchange(work.keys, work.next_keys);
        exchange(work.values, work.next_values);
        if (!look_ahead(args, task, end, smaller(end + KEYS, task.key_end), work)) return false;
        for (int64_t head = 0; head < heads; ++head) {
            const Work<T> one = work.of(head);
            score(args, one, end - begin);
            weigh(args, task, one, begin, end - begin);
            mix(args, one, end - begin);
        }
    }
    write_out(args, task, work, partials);
    return true;
}

// Parts are added in the order of their keys, relative to the largest score of all.
template <class T>
void merge_as(const AttentionArgs& args, const AttentionTask& first, const float* partials) {
    const int64_t rows =
        (first.query_end - first.query_begin) * group_size(args) * (first.kv_head_end - first.kv_head_begin);
    const int64_t value_size = round_up(args.v_dim, ATTENTION_VALUE_PAD), part_size = rows * (2 + value_size);
    const float* base = partials + first.partial;
    for (int64_t m = 0; m < rows; ++m) {
        float top = HIDDEN, total = 0.0f;
        for (int part = 0; part < first.num_parts; ++part) {
            const float candidate = base[part * part_size + m];
            top = candidate > top ? candidate : top;
        }
        T* out = out_row<T>(args, first, m);
        for (int part = 0; part < first.num_parts; ++part) {
            const float* place = base + part * part_size;
            if (place[rows + m] != 0.0f) total += place[rows + m] * vexp(splat(place[m] - top))[0];
        }
        const float factor = total == 0.0f ? 0.0f : 1.0f / total;
        for (int64_t i = 0; i < args.v_dim; i += W) {
            vf mixed{};
            for (int part = 0; part < first.num_parts; ++part) {
                const float* place = base + part * part_size;
                if (place[rows + m] == 0.0f) continue;
                const float* acc = place + 2 * rows + m * value_size;
                mixed += load(acc + i) * vexp(splat(place[m] - top))[0];
            }
            store_first(out + i, mixed * factor, smaller(W, args.v_dim - i));
        }
    }
}

} // namespace

int64_t attention_scratch(const AttentionArgs& args) {
    const int64_t one = larger(ATTENTION_QUERY_ROWS, group_size(args)); // rows of one KV head
    const int64_t all = larger(one, ATTENTION_JOINT_ROWS * args.kv_heads);
    const int64_t kept = all * (round_up(args.head_dim, 2 * W) + round_up(args.v_dim, ATTENTION_VALUE_PAD) + 2);
    return (kept + one * (KEYS + 1)) * 4 + 4 * POINTERS + 10 * 64;
}

bool attend(const AttentionArgs& args, const AttentionTask& task, char* scratch, float* partials) {
    switch (args.dtype) {
    case DType::f32: return attend_as<float>(args, task, scratch, partials);
    case DType::bf16: return attend_as<bf16>(args, task, scratch, partials);
    case DType::f16: return attend_as<f16>(args, task, scratch, partials);
    }
    return false;
}

void attention_merge(const AttentionArgs& args, const AttentionTask& first, const float* partials) {
    switch (args.dtype) {
    case DType::f32: return merge_as<float>(args, first, partials);
    case DType::bf16: return merge_as<bf16>(args, first, partials);
    case DType::f16: return merge_as<f16>(args, first, partials);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
