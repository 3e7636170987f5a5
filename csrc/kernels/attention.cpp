// Paged attention: one task is some consecutive queries of one row, or of several rows that share their pages, all
// query heads of one KV head or of several. Keys are visited in blocks; softmax is computed online (Milakov, Gimelshein
// 2018), its state kept per query row:
//
//   block of <= 64 keys:  scores[M][64] = Q K^T  ->  hide, softcap  ->  max, exp, sum  ->  acc[M][Dv] = acc * a + P V
//
// A split row's keys are cut at fixed positions (ATTENTION_SPLIT); every part starts afresh and leaves its state, and
// the parts are added in order. Every row's arithmetic depends on its own keys only, in an order fixed by their
// positions, so results are the same for any number of threads and whoever shares the task.
//
// This file: any element type on any level, arithmetic in float32. bfloat16 on a level that multiplies pairs of it is
// done by attention_pairs.cpp.
#include "attention_rows.hpp"
#include "int8_rows.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

constexpr int64_t KEYS = ATTENTION_KEY_BLOCK;
constexpr int TILE_ROWS = W == 16 ? 4 : 2; // TILE_ROWS * 4 accumulators stay in registers
constexpr int64_t POINTERS = KEYS * int64_t{sizeof(void*)};

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

// Everything a task keeps for one KV head while it walks its keys.
template <class T>
struct Work {
    using Query = typename Dot<T>::Query;
    int64_t kv_head;
    const QueryRow* info;                 // [rows]
    int64_t rows, query_size, value_size; // sizes padded to whole vectors
    Query* queries;                       // [rows][query_size]
    float* acc;                           // [rows][value_size]
    float* top;                           // [rows] largest score so far
    float* total;                         // [rows] sum of exp(score - top)
    float* scores;                        // [rows][KEYS] of this block, shared by the heads, as all below
    float* shrink;                        // [rows] what acc is to be multiplied by before this block is added
    Spots<T> here;                        // [KEYS] of this block; of an int8 cache the rows below
    Spots<T> next;                        // [KEYS] of the block after it
    Spots<int8_t> here8, next8;           // the same in an int8 cache
    T* wide_keys;                         // [KEYS][head_dim] of one KV head, expanded from int8
    T* wide_values;                       // [KEYS][v_dim]

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

template <class T>
Work<T> make_work(const AttentionArgs& args, const AttentionTask& task, char* scratch) {
    using Query = typename Work<T>::Query;
    Work<T> work;
    work.kv_head = task.kv_head_begin;
    work.rows = count_rows(args, task);
    QueryRow* info = reinterpret_cast<QueryRow*>(carve(scratch, work.rows * int64_t{sizeof(QueryRow)}));
    list_rows(args, task, info);
    work.info = info;
    work.query_size = round_up(args.head_dim, Dot<T>::step);
    work.value_size = round_up(args.v_dim, ATTENTION_VALUE_PAD);
    const int64_t all = work.rows * (task.kv_head_end - task.kv_head_begin);
    work.queries = reinterpret_cast<Query*>(carve(scratch, all * work.query_size * int64_t{sizeof(Query)}));
    work.acc = reinterpret_cast<float*>(carve(scratch, all * work.value_size * 4));
    work.top = reinterpret_cast<float*>(carve(scratch, all * 4));
    work.total = reinterpret_cast<float*>(carve(scratch, all * 4));
    work.scores = reinterpret_cast<float*>(carve(scratch, work.rows * KEYS * 4));
    work.shrink = reinterpret_cast<float*>(carve(scratch, work.rows * 4));
    work.here = carve_spots<T>(scratch);
    work.next = carve_spots<T>(scratch);
    if (!args.int8_kv) return work;
    work.here8 = carve_spots<int8_t>(scratch);
    work.next8 = carve_spots<int8_t>(scratch);
    work.wide_keys = reinterpret_cast<T*>(carve(scratch, KEYS * args.head_dim * int64_t{sizeof(T)}));
    work.wide_values = reinterpret_cast<T*>(carve(scratch, KEYS * args.v_dim * int64_t{sizeof(T)}));
    for (int64_t n = 0; n < KEYS; ++n) {
        work.here.keys[n] = work.wide_keys + n * args.head_dim;
        work.here.values[n] = work.wide_values + n * args.v_dim;
    }
    return work;
}

// Rows of one KV head of an int8 cache as the queries' type. Scores of up to 3 keys more are computed, and hidden.
template <class T>
void expand_block(const AttentionArgs& args, const Work<T>& work, int64_t count) {
    const int64_t k_offset = work.kv_head * args.k_head_stride, v_offset = work.kv_head * args.v_head_stride;
    for (int64_t n = 0; n < count; ++n) {
        expand_row(work.here8.keys[n] + k_offset, args.head_dim, work.wide_keys + n * args.head_dim);
        expand_row(work.here8.values[n] + v_offset, args.v_dim, work.wide_values + n * args.v_dim);
    }
    const int64_t rest = (round_up(count, 4) - count) * args.head_dim;
    memset(work.wide_keys + count * args.head_dim, 0, static_cast<size_t>(rest) * sizeof(T));
}

void copy_query(float* to, const float* from, int64_t n) { memcpy(to, from, static_cast<size_t>(n) * 4); }
template <class T>
void copy_query(float* to, const T* from, int64_t n) {
    for_row(
        n, [&](int64_t i) { store(to + i, load(from + i)); },
        [&](int64_t i, int64_t rest) { store_first(to + i, load_first(from + i, rest), rest); });
}

template <class T>
void copy_queries(const AttentionArgs& args, const Work<T>& work) {
    memset(work.queries, 0, static_cast<size_t>(work.rows * work.query_size) * sizeof(*work.queries));
    for (int64_t m = 0; m < work.rows; ++m) {
        const int64_t head = work.kv_head * group_size(args) + work.info[m].lane;
        const T* q = reinterpret_cast<const T*>(args.q) + work.info[m].token * args.q_token_stride;
        copy_query(work.queries + m * work.query_size, q + head * args.q_head_stride, args.head_dim);
    }
}

// Begins a part. The sink is one more score that every query sees first; only the first part counts it.
template <class T>
void start(const AttentionArgs& args, const Work<T>& work, bool first) {
    memset(work.acc, 0, static_cast<size_t>(work.rows * work.value_size) * 4);
    const bool sink = args.sinks != nullptr && first;
    for (int64_t m = 0; m < work.rows; ++m) {
        const int64_t head = work.kv_head * group_size(args) + work.info[m].lane;
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
bool look_ahead(const AttentionArgs& args, const AttentionTask& task, int64_t begin, int64_t end, Spots<T> next) {
    if (!locate(args, task, begin, end, next)) return false;
    int64_t n = 0;
    for (; n < end - begin; ++n) {
        prefetch(next.keys[n], args.k_head_stride, task.kv_head_begin, task.kv_head_end, args.head_dim);
        prefetch(next.values[n], args.v_head_stride, task.kv_head_begin, task.kv_head_end, args.v_dim);
    }
    for (; n % 4 != 0; ++n) next.keys[n] = next.keys[n - 1]; // scored with the last tile, hidden afterwards
    return true;
}

template <class T>
bool look_ahead(const AttentionArgs& args, const AttentionTask& task, int64_t begin, int64_t end, Work<T>& work) {
    return args.int8_kv ? look_ahead(args, task, begin, end, work.next8)
                        : look_ahead(args, task, begin, end, work.next);
}

template <class T>
void step_on(const AttentionArgs& args, Work<T>& work) {
    if (args.int8_kv) {
        exchange(work.here8, work.next8);
    } else {
        exchange(work.here, work.next);
    }
}

template <class T, int ROWS>
void score_tile(const Work<T>& work, int64_t head_offset, int64_t head_dim, int64_t m, int64_t n) {
    using D = Dot<T>;
    const typename D::Query* q = work.queries + m * work.query_size;
    const T* const* rows = work.here.keys + n;
    const T* const keys[4] = {rows[0] + head_offset, rows[1] + head_offset, rows[2] + head_offset,
                              rows[3] + head_offset};
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
    const int64_t offset = args.int8_kv ? 0 : work.kv_head * args.k_head_stride, head_dim = args.head_dim;
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
float finish_scores(const AttentionArgs& args, float* scores, const Seen& seen, int64_t padded) {
    const int64_t first_seen = seen.first, end_seen = seen.end;
    vf best = splat(HIDDEN);
    for (int64_t n = 0; n < padded; n += W) {
        vf s = load(scores + n) * args.scale;
        if (args.softcap > 0.0f) s = args.softcap * vtanh(s * (1.0f / args.softcap));
        if (n < first_seen || n + W > end_seen) {
            for (int lane = 0; lane < W; ++lane) {
                if (n + lane < first_seen || n + lane >= end_seen) s[lane] = HIDDEN;
            }
        }
        if (n + W > seen.own) {
            for (int64_t i = larger(n, seen.own); i < smaller(n + W, end_seen); ++i) {
                if (seen.mask[i - seen.own] == 0) s[i - n] = HIDDEN;
            }
        }
        best = vmax(s, best);
        store(scores + n, s);
    }
    return max_lane(best);
}

// Scores become softmax weights relative to the running maximum; total and shrink are brought up to date.
template <class T>
void weigh(const AttentionArgs& args, const Work<T>& work, int64_t begin, int64_t count) {
    const int64_t padded = round_up(count, W);
    for (int64_t m = 0; m < work.rows; ++m) {
        float* scores = work.scores + m * KEYS;
        const Seen seen = seen_by(args, work.info[m], begin, count);
        if (seen.end <= seen.first) { // this query sees none of the block
            work.shrink[m] = 1.0f;
            memset(scores, 0, static_cast<size_t>(padded) * 4);
            continue;
        }
        const float best = finish_scores(args, scores, seen, padded);
        const float top = best > work.top[m] ? best : work.top[m];
        const float base = top == HIDDEN ? 0.0f : top; // a tree mask may hide all so far
        vf added{};
        for (int64_t n = 0; n < padded; n += W) {
            const vf weight = vexp(load(scores + n) - base);
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
        const T* source = work.here.values[n] + head_offset + i;
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
    const int64_t offset = args.int8_kv ? 0 : work.kv_head * args.v_head_stride, v_dim = args.v_dim;
    int64_t m = 0;
    for (; m + TILE_ROWS <= work.rows; m += TILE_ROWS) mix_rows<T, TILE_ROWS>(work, offset, m, v_dim, count);
    if (TILE_ROWS > 2 && m + 2 <= work.rows) {
        mix_rows<T, 2>(work, offset, m, v_dim, count);
        m += 2;
    }
    if (m < work.rows) mix_rows<T, 1>(work, offset, m, v_dim, count);
}

template <class T>
void write_out(const AttentionArgs& args, const AttentionTask& task, const Work<T>& work, int64_t begin,
               float* partials) {
    for (int64_t m = 0; m < work.rows; ++m) {
        const float* acc = work.acc + m * work.value_size;
        if (!task.split) {
            write_row(out_row<T>(args, work.info[m], work.kv_head), acc, work.total[m], args.v_dim);
            continue;
        }
        float* entry = entry_of(args, task, work.info[m], work.kv_head, begin, partials);
        entry[0] = work.top[m];
        entry[1] = work.total[m];
        memcpy(entry + 16, acc, static_cast<size_t>(work.value_size) * 4);
    }
}

template <class T>
bool attend_piece(const AttentionArgs& args, const AttentionTask& task, Work<T> work, float* partials) {
    const int64_t heads = task.kv_head_end - task.kv_head_begin;
    for (int64_t head = 0; head < heads; ++head) copy_queries(args, work.of(head));
    const auto block_end = [&](int64_t begin) { return smaller(begin + KEYS, part_end(task, begin)); };
    if (!look_ahead(args, task, task.key_begin, block_end(task.key_begin), work)) return false;
    int64_t part = task.key_begin;
    for (int64_t begin = task.key_begin, end; begin < task.key_end; begin = end) {
        end = block_end(begin);
        step_on(args, work);
        if (end < task.key_end && !look_ahead(args, task, end, block_end(end), work)) return false;
        const bool first = !task.split || begin / ATTENTION_SPLIT == task.first_part;
        const bool last = end == part_end(task, part);
        for (int64_t head = 0; head < heads; ++head) {
            const Work<T> one = work.of(head);
            if (begin == part) start(args, one, first);
            if (args.int8_kv) expand_block(args, one, end - begin);
            score(args, one, end - begin);
            weigh(args, one, begin, end - begin);
            mix(args, one, end - begin);
            if (last) write_out(args, task, one, part, partials);
        }
        if (last) part = end;
    }
    return true;
}

// A long row's queries are done ATTENTION_QUERY_ROWS rows at a time, each as far as it sees.
template <class T>
bool attend_as(const AttentionArgs& args, const AttentionTask& task, char* scratch, float* partials) {
    const Work<T> work = make_work<T>(args, task, scratch);
    if (work.rows <= ATTENTION_QUERY_ROWS || task.split) return attend_piece(args, task, work, partials);
    for (int64_t m = 0; m < work.rows; m += ATTENTION_QUERY_ROWS) {
        Work<T> piece = work;
        piece.info += m;
        piece.rows = smaller(ATTENTION_QUERY_ROWS, work.rows - m);
        AttentionTask seen = task;
        if (args.tree_mask == nullptr) {
            seen.key_end = static_cast<int32_t>(smaller(task.key_end, piece.info[piece.rows - 1].position + 1));
        }
        const int64_t low = args.window > 0 ? piece.info[0].position + 1 - args.window : 0;
        while (seen.key_begin + KEYS <= low) seen.key_begin += KEYS;
        if (!attend_piece(args, seen, piece, partials)) return false;
    }
    return true;
}

// Parts are added in the order of their keys, relative to the largest score of all. `unit` is the natural logarithm of
// the base the weights are powers of.
template <class T>
void merge_as(const AttentionArgs& args, const AttentionMember& member, int64_t kv_head, int64_t parts,
              const float* partials, float unit) {
    const int64_t rows = member.queries * group_size(args), size = attention_entry_size(args);
    const int64_t stride = args.kv_heads * rows * size;
    for (int64_t m = 0; m < rows; ++m) {
        const float* base = partials + member.partial + (kv_head * rows + m) * size;
        float top = HIDDEN, total = 0.0f;
        for (int64_t part = 0; part < parts; ++part) {
            const float candidate = base[part * stride];
            top = candidate > top ? candidate : top;
        }
        const auto share = [&](const float* entry) { return vexp(splat((entry[0] - top) * unit))[0]; };
        for (int64_t part = 0; part < parts; ++part) {
            const float* entry = base + part * stride;
            if (entry[1] != 0.0f) total += entry[1] * share(entry);
        }
        const float factor = total == 0.0f ? 0.0f : 1.0f / total;
        const int32_t group = static_cast<int32_t>(group_size(args)), local = static_cast<int32_t>(m);
        const QueryRow row{&member, member.token + local / group, 0, local % group, local};
        T* out = out_row<T>(args, row, kv_head);
        for (int64_t i = 0; i < args.v_dim; i += 4 * W) { // so that a share is computed once for several vectors
            vf mixed[4] = {};
            const int64_t vectors = smaller(4, (args.v_dim - i + W - 1) / W);
            for (int64_t part = 0; part < parts; ++part) {
                const float* entry = base + part * stride;
                if (entry[1] == 0.0f) continue;
                const float factor_here = share(entry);
                for (int64_t c = 0; c < vectors; ++c) mixed[c] += load(entry + 16 + i + c * W) * factor_here;
            }
            for (int64_t c = 0; c < vectors; ++c) {
                store_first(out + i + c * W, mixed[c] * factor, smaller(W, args.v_dim - i - c * W));
            }
        }
    }
}

} // namespace

int64_t attention_scratch(const AttentionArgs& args) {
    if (attention_in_pairs(args)) return attention_pairs_scratch(args);
    const int64_t one = larger(ATTENTION_TASK_ROWS, group_size(args)); // rows of one KV head
    const int64_t all = larger(one, ATTENTION_JOINT_ROWS * args.kv_heads);
    const int64_t kept = all * (round_up(args.head_dim, 2 * W) + round_up(args.v_dim, ATTENTION_VALUE_PAD) + 2);
    const int64_t wide = args.int8_kv ? KEYS * (args.head_dim + args.v_dim) * 4 + 4 * POINTERS + 6 * 64 : 0;
    return (kept + one * (KEYS + 1)) * 4 + one * int64_t{sizeof(QueryRow)} + 4 * POINTERS + 11 * 64 + wide;
}

bool attend(const AttentionArgs& args, const AttentionTask& task, char* scratch, float* partials) {
    if (attention_in_pairs(args)) return attend_pairs(args, task, scratch, partials);
    switch (args.dtype) {
    case DType::f32: return attend_as<float>(args, task, scratch, partials);
    case DType::bf16: return attend_as<bf16>(args, task, scratch, partials);
    case DType::f16: return attend_as<f16>(args, task, scratch, partials);
    }
    return false;
}

void attention_merge(const AttentionArgs& args, const AttentionMember& member, int64_t kv_head, int64_t parts,
                     const float* partials) {
    const float unit = attention_in_pairs(args) ? 0.693147180559945f : 1.0f;
    switch (args.dtype) {
    case DType::f32: return merge_as<float>(args, member, kv_head, parts, partials, unit);
    case DType::bf16: return merge_as<bf16>(args, member, kv_head, parts, partials, unit);
    case DType::f16: return merge_as<f16>(args, member, kv_head, parts, partials, unit);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
