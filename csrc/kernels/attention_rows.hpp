// What both attention kernels need to know about a task: its query rows, where its keys lie, where results go.
#pragma once

#include "leaves.hpp"
#include "simd.hpp"

namespace pando {
namespace PANDO_LEVEL {

constexpr float HIDDEN = -__builtin_inff();

inline int64_t group_size(const AttentionArgs& args) { return args.heads / args.kv_heads; }

inline char* carve(char*& scratch, int64_t bytes) {
    char* piece = scratch;
    scratch += round_up(bytes, 64);
    return piece;
}

// Query rows of one KV head: members, their queries, the heads of the group.
struct QueryRow {
    const AttentionMember* member;
    int32_t token, position;
    int32_t lane;  // head within the group
    int32_t local; // number among the member's rows
};

inline int64_t count_rows(const AttentionArgs& args, const AttentionTask& task) {
    int64_t queries = 0;
    for (int32_t i = 0; i < task.num_members; ++i) queries += task.members[i].queries;
    return queries * group_size(args);
}

inline void list_rows(const AttentionArgs& args, const AttentionTask& task, QueryRow* rows) {
    const int32_t group = static_cast<int32_t>(group_size(args));
    for (int32_t i = 0; i < task.num_members; ++i) {
        const AttentionMember& member = task.members[i];
        for (int32_t query = 0; query < member.queries; ++query) {
            for (int32_t lane = 0; lane < group; ++lane) {
                *rows++ = {&member, member.token + query, member.position + query, lane, query * group + lane};
            }
        }
    }
}

// Positions [begin, end) of a block this row sees, as offsets into the block; with a tree mask, those the mask decides
// on are [own, end) and `mask` holds their bytes.
struct Seen {
    int64_t first, end, own;
    const uint8_t* mask;
};

inline Seen seen_by(const AttentionArgs& args, const QueryRow& row, int64_t begin, int64_t count) {
    Seen seen{0, smaller(count, row.position + 1 - begin), count, nullptr};
    if (args.window > 0) seen.first = larger(0, row.position + 1 - args.window - begin);
    const AttentionMember& member = *row.member;
    if (args.tree_mask != nullptr) {
        seen.end = count;
        seen.own = larger(0, member.own - begin);
        const int64_t query = row.token - member.token;
        if (seen.own < count) {
            seen.mask = args.tree_mask + member.mask + query * member.own_queries + begin + seen.own - member.own;
        }
    }
    return seen;
}

// Whether every row of the task sees all of [begin, end).
inline bool all_seen(const AttentionArgs& args, const AttentionTask& task, int64_t begin, int64_t end) {
    for (int32_t i = 0; i < task.num_members; ++i) {
        const AttentionMember& member = task.members[i];
        if (end > (args.tree_mask != nullptr ? member.own : member.position + 1)) return false;
        if (args.window > 0 && member.position + member.queries - begin > args.window) return false;
    }
    return true;
}

// A pointer to KV head 0 of some positions' keys and values, in rows of T or, in an int8 cache, of int8_t.
template <class T>
struct Spots {
    const T** keys;
    const T** values;
};

template <class T>
void exchange(Spots<T>& a, Spots<T>& b) {
    const Spots<T> kept = a;
    a = b;
    b = kept;
}

template <class T>
Spots<T> carve_spots(char*& scratch) {
    const T** keys = reinterpret_cast<const T**>(carve(scratch, ATTENTION_KEY_BLOCK * int64_t{sizeof(void*)}));
    return {keys, reinterpret_cast<const T**>(carve(scratch, ATTENTION_KEY_BLOCK * int64_t{sizeof(void*)}))};
}

// Fills in those of positions [begin, end) of the first member's row. Before its window, where blocks may begin, stand
// those of the first position it sees: what lies on pages that fell out of a window is not read, as nothing times NaN
// is not nothing. False if the page table leaves the cache.
template <class T>
bool locate(const AttentionArgs& args, const AttentionTask& task, int64_t begin, int64_t end, const Spots<T>& spots) {
    const int32_t* pages = args.page_table + task.members[0].row * args.table_stride;
    const T* k = reinterpret_cast<const T*>(args.k);
    const T* v = reinterpret_cast<const T*>(args.v);
    const int64_t low = args.window > 0 ? task.members[0].position + 1 - args.window : begin;
    const int64_t from = low < end ? larger(begin, low) : begin;
    int64_t page = from / args.page_size, offset = from % args.page_size, n = from - begin;
    for (int64_t position = from; position < end; ++page, offset = 0) {
        const int64_t first = pages[page] * args.page_size;
        const int64_t count = smaller(args.page_size - offset, end - position);
        if (first < 0 || first + offset + count > args.num_slots) return false;
        for (int64_t i = 0; i < count; ++i, ++n) {
            spots.keys[n] = k + (first + offset + i) * args.k_slot_stride;
            spots.values[n] = v + (first + offset + i) * args.v_slot_stride;
        }
        position += count;
    }
    for (n = 0; n < from - begin; ++n) {
        spots.keys[n] = spots.keys[from - begin];
        spots.values[n] = spots.values[from - begin];
    }
    return true;
}

// The entry of a query row for the part that holds `position`.
inline float* entry_of(const AttentionArgs& args, const AttentionTask& task, const QueryRow& row, int64_t kv_head,
                       int64_t position, float* partials) {
    const int64_t part = position / ATTENTION_SPLIT - task.first_part;
    const int64_t rows = row.member->queries * group_size(args);
    return partials + row.member->partial +
           ((part * args.kv_heads + kv_head) * rows + row.local) * attention_entry_size(args);
}

// End of the part that begins at `begin`: where the results so far are put down.
inline int64_t part_end(const AttentionTask& task, int64_t begin) {
    return task.split ? smaller(task.key_end, (begin / ATTENTION_SPLIT + 1) * ATTENTION_SPLIT) : task.key_end;
}

template <class T>
T* out_row(const AttentionArgs& args, const QueryRow& row, int64_t kv_head) {
    return reinterpret_cast<T*>(args.out) +
           (row.token * args.heads + kv_head * group_size(args) + row.lane) * args.v_dim;
}

template <class T>
void write_row(T* out, const float* acc, float total, int64_t n) {
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    for_row(
        n, [&](int64_t i) { store(out + i, load(acc + i) * factor); },
        [&](int64_t i, int64_t rest) { store_first(out + i, load_first(acc + i, rest) * factor, rest); });
}

} // namespace PANDO_LEVEL
} // namespace pando
