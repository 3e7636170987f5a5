#include "attention_plan.hpp"

#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace pando {

namespace {

// Multiply-adds of a call below which it runs on the caller alone.
constexpr int64_t SMALL_ATTENTION = 1 << 19;

// Tasks there should be for every thread: what is left over when the others are done is a small part then.
constexpr int64_t TASKS_PER_THREAD = 4;

// Dims of the KV heads one task takes together: a block of their keys stays in the second-level cache.
constexpr int64_t JOINT_DIMS = 1024;

std::atomic<bool> sharing{true};

[[noreturn]] void out_of_range(const char* what) { throw std::invalid_argument(std::string(what) + " out of range"); }

int64_t round_up_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// What a cut depends on beside the ragged arguments.
struct Kind {
    const void *page_table, *cu_q_lens, *kv_lens;
    int64_t rows, tokens, heads, kv_heads, v_dim, window, page_size, table_stride;
    int64_t threads;
    bool shared, tree, whole;

    bool operator==(const Kind& other) const {
        return page_table == other.page_table && cu_q_lens == other.cu_q_lens && kv_lens == other.kv_lens &&
               rows == other.rows && tokens == other.tokens && heads == other.heads && kv_heads == other.kv_heads &&
               v_dim == other.v_dim && window == other.window && page_size == other.page_size &&
               table_stride == other.table_stride && threads == other.threads && shared == other.shared &&
               tree == other.tree && whole == other.whole;
    }
};

Kind kind_of(const AttentionArgs& args, bool whole) {
    return {args.page_table,
            args.cu_q_lens,
            args.kv_lens,
            args.num_rows,
            args.num_tokens,
            args.heads,
            args.kv_heads,
            args.v_dim,
            args.window,
            args.page_size,
            args.table_stride,
            num_threads(),
            sharing.load(),
            args.tree_mask != nullptr,
            whole};
}

// Rows of a batch, or parts of rows, that one task may serve.
struct Segment {
    int32_t member_begin, num_members; // in Cut::members
    int32_t query_rows;                // of one KV head
    int32_t part_begin, part_end, first_part;
    int32_t key_begin, key_end;
    bool split;
};

} // namespace

// Built in three passes: rows, what they share, tasks.
struct AttentionPlan::Cut {
    Kind kind{};
    bool valid = false;

    std::vector<AttentionMember> members; // of row r at [r], then lists of those that share
    std::vector<int32_t> parts;           // of row r; 0: not split
    std::vector<int32_t> shared_parts;    // of row r, from its first
    std::vector<int32_t> order;           // rows that may share
    std::vector<Segment> segments;
    std::vector<AttentionTask> tasks;
    std::vector<int32_t> pieces; // tasks that add to one KV head of row r; 0: its tasks write the output themselves
    std::unique_ptr<std::atomic<int32_t>[]> open; // [row][KV head] of them that are not done
    size_t open_size = 0;
    int64_t partial_floats = 0, work = 0, keys_read = 0, keys_seen = 0;

    void build(const AttentionArgs& args, bool whole);

  private:
    void add_row(const AttentionArgs& args, int64_t row, int64_t mask);
    void add_long_row(const AttentionArgs& args, const AttentionMember& whole);
    int64_t rows_per_task(const AttentionArgs& args) const;
    void share(const AttentionArgs& args, size_t begin, size_t end, int32_t part);
    void add_shared(const AttentionArgs& args, size_t begin, size_t end, int32_t part_begin, int32_t part_end);
    void add_own(const AttentionArgs& args, int64_t row);
    void add_tasks(const AttentionArgs& args);
    int32_t begin_of(const AttentionArgs& args, int64_t position) const;
};

namespace {

int64_t first_key(const AttentionArgs& args, int64_t position) {
    return args.window > 0 ? std::max<int64_t>(0, position + 1 - args.window) : 0;
}

// Positions the last of some queries sees end before this.
int64_t end_key(const AttentionArgs& args, const AttentionMember& member) {
    return args.tree_mask != nullptr ? member.own + member.own_queries : member.position + member.queries;
}

// Parts of a row that lie before its own queries, which all of them see in full.
int32_t shareable(const AttentionMember& member) { return static_cast<int32_t>(member.own / ATTENTION_SPLIT); }

// The pages that hold a part.
struct PageRange {
    int64_t begin, end;
};
PageRange pages_of(const AttentionArgs& args, int32_t part) {
    return {part * ATTENTION_SPLIT / args.page_size, round_up_div((part + 1) * ATTENTION_SPLIT, args.page_size)};
}

int compare_pages(const AttentionArgs& args, int32_t a, int32_t b, int32_t part) {
    const PageRange range = pages_of(args, part);
    return std::memcmp(args.page_table + a * args.table_stride + range.begin,
                       args.page_table + b * args.table_stride + range.begin,
                       static_cast<size_t>(range.end - range.begin) * sizeof(int32_t));
}

} // namespace

void AttentionPlan::Cut::build(const AttentionArgs& args, bool whole) {
    kind = kind_of(args, whole);
    valid = false;
    partial_floats = work = keys_read = keys_seen = 0;
    members.clear();
    order.clear();
    segments.clear();
    tasks.clear();
    parts.assign(static_cast<size_t>(args.num_rows), 0);
    shared_parts.assign(static_cast<size_t>(args.num_rows), 0);
    pieces.assign(static_cast<size_t>(args.num_rows), 0);
    int64_t mask = 0;
    for (int64_t row = 0; row < args.num_rows; ++row) {
        add_row(args, row, mask);
        const int64_t queries = members.back().own_queries;
        mask += queries * queries;
    }
    if (args.tree_mask != nullptr && mask > args.tree_mask_size) out_of_range("tree_mask");
    share(args, 0, order.size(), 0);
    for (int64_t row = 0; row < args.num_rows; ++row) add_own(args, row);
    add_tasks(args);
    const size_t wanted = static_cast<size_t>(args.num_rows * args.kv_heads);
    if (wanted > open_size) {
        open.reset(new std::atomic<int32_t>[wanted]);
        open_size = wanted;
    }
    valid = true;
}

// A row of few queries may be split and may share; the pieces of one with many are work enough by themselves.
void AttentionPlan::Cut::add_row(const AttentionArgs& args, int64_t row, int64_t mask) {
    const int64_t begin = args.cu_q_lens[row], end = args.cu_q_lens[row + 1], keys = args.kv_lens[row];
    if (begin < 0 || end < begin || end > args.num_tokens) out_of_range("cu_q_lens");
    const int64_t queries = end - begin;
    if (queries > 0 && (keys < queries || keys > args.table_width * args.page_size)) out_of_range("kv_lens");
    const int32_t own = static_cast<int32_t>(keys - queries);
    members.push_back({static_cast<int32_t>(row), static_cast<int32_t>(begin), static_cast<int32_t>(queries), own, own,
                       static_cast<int32_t>(queries), mask, 0});
    const int64_t group = args.heads / args.kv_heads, low = first_key(args, own);
    if (kind.whole || queries == 0 || (queries > 1 && queries * group > ATTENTION_QUERY_ROWS) ||
        keys - low <= ATTENTION_SPLIT)
        return;
    parts[row] = static_cast<int32_t>(round_up_div(keys, ATTENTION_SPLIT) - low / ATTENTION_SPLIT);
    members.back().partial = partial_floats;
    partial_floats += parts[row] * args.heads * queries * attention_entry_size(args);
    if (kind.shared && args.window <= 0 && shareable(members.back()) > 0) order.push_back(static_cast<int32_t>(row));
}

// order[begin, end) have the same pages before `part`: goes on with them while they have, then with each subset that
// has. Every part is compared in full, so equal page ids need not mean equal prefixes.
void AttentionPlan::Cut::share(const AttentionArgs& args, size_t begin, size_t end, int32_t part) {
    const auto long_enough = [&](int32_t row, int32_t n) { return shareable(members[row]) > n; };
    const int32_t from = part;
    for (; end - begin >= 2; ++part) {
        const auto first = order.begin() + static_cast<int64_t>(begin),
                   last = order.begin() + static_cast<int64_t>(end);
        const bool together = std::all_of(first, last, [&](int32_t row) {
            return long_enough(row, part) && compare_pages(args, *first, row, part) == 0;
        });
        if (!together) break;
    }
    if (part > from) add_shared(args, begin, end, from, part);
    if (end - begin < 2) return;
    auto first = order.begin() + static_cast<int64_t>(begin), last = order.begin() + static_cast<int64_t>(end);
    last = std::partition(first, last, [&](int32_t row) { return long_enough(row, part); });
    std::sort(first, last, [&](int32_t a, int32_t b) {
        const int difference = compare_pages(args, a, b, part);
        return difference != 0 ? difference < 0 : a < b;
    });
    const size_t stop = static_cast<size_t>(last - order.begin());
    for (size_t low = begin, high; low < stop; low = high) {
        for (high = low + 1; high < stop && compare_pages(args, order[low], order[high], part) == 0;) ++high;
        if (high - low >= 2) share(args, low, high, part);
    }
}

// As many rows to a segment as a task holds query rows.
void AttentionPlan::Cut::add_shared(const AttentionArgs& args, size_t begin, size_t end, int32_t part_begin,
                                    int32_t part_end) {
    const int64_t group = args.heads / args.kv_heads;
    const int32_t key_begin = static_cast<int32_t>(part_begin * ATTENTION_SPLIT);
    const int32_t key_end = static_cast<int32_t>(part_end * ATTENTION_SPLIT);
    for (size_t i = begin; i < end;) {
        Segment segment{static_cast<int32_t>(members.size()), 0, 0, part_begin, part_end, 0, key_begin, key_end, true};
        do {
            const int32_t row = order[i++];
            shared_parts[row] = part_end;
            pieces[row] += part_end - part_begin;
            const AttentionMember member = members[row];
            members.push_back(member);
            ++segment.num_members;
            segment.query_rows += static_cast<int32_t>(member.queries * group);
        } while (i < end && segment.query_rows + members[order[i]].queries * group <= ATTENTION_QUERY_ROWS);
        segments.push_back(segment);
        keys_read += key_end - key_begin;
    }
}

// Where the keys a query sees begin; where all walk whole, the block that they begin in.
int32_t AttentionPlan::Cut::begin_of(const AttentionArgs& args, int64_t position) const {
    const int64_t first = first_key(args, position);
    return static_cast<int32_t>(kind.whole ? first / ATTENTION_KEY_BLOCK * ATTENTION_KEY_BLOCK : first);
}

void AttentionPlan::Cut::add_own(const AttentionArgs& args, int64_t row) {
    const AttentionMember& whole = members[row];
    if (whole.queries == 0) return;
    const int64_t group = args.heads / args.kv_heads;
    if (parts[row] == 0 && whole.queries > 1 && whole.queries * group > ATTENTION_QUERY_ROWS) {
        add_long_row(args, whole);
        return;
    }
    const int32_t low = begin_of(args, whole.own);
    const int32_t high = static_cast<int32_t>(whole.own + whole.own_queries);
    const int32_t first_part = static_cast<int32_t>(low / ATTENTION_SPLIT);
    keys_seen += high - low;
    const int32_t part_begin = std::max(first_part, shared_parts[row]);
    const int32_t key_begin = std::max<int32_t>(low, static_cast<int32_t>(shared_parts[row] * ATTENTION_SPLIT));
    if (key_begin == high) return; // can not be: a row's own queries are not shared
    segments.push_back({static_cast<int32_t>(row), 1, static_cast<int32_t>(whole.queries * group), part_begin,
                        first_part + std::max(1, parts[row]), first_part, key_begin, high, parts[row] > 0});
    keys_read += high - key_begin;
    if (parts[row] > 0) pieces[row] += first_part + parts[row] - part_begin;
}

// Many rows to a task read and arrange each block of keys less often; there must be tasks enough.
int64_t AttentionPlan::Cut::rows_per_task(const AttentionArgs& args) const {
    const int64_t pieces = args.num_tokens * args.heads / ATTENTION_QUERY_ROWS;
    const int64_t together = pieces / (2 * kind.threads * TASKS_PER_THREAD);
    return std::clamp<int64_t>(together * ATTENTION_QUERY_ROWS, ATTENTION_QUERY_ROWS, ATTENTION_TASK_ROWS);
}

// Later queries of a row see more keys: they come first, so that no thread is left with a long piece at the end.
void AttentionPlan::Cut::add_long_row(const AttentionArgs& args, const AttentionMember& row) {
    const AttentionMember whole = row; // `members` grows
    const int64_t per_task = std::max<int64_t>(1, rows_per_task(args) / (args.heads / args.kv_heads));
    for (int64_t piece = round_up_div(whole.queries, per_task) - 1; piece >= 0; --piece) {
        const int32_t from = static_cast<int32_t>(piece * per_task);
        AttentionMember member = whole;
        member.token += from;
        member.position += from;
        member.queries = static_cast<int32_t>(std::min<int64_t>(per_task, whole.queries - from));
        member.mask += static_cast<int64_t>(from) * whole.own_queries;
        // Blocks at fixed positions, so that no result depends on where rows are cut.
        const int64_t first = first_key(args, member.position);
        const int32_t low = static_cast<int32_t>(first / ATTENTION_KEY_BLOCK * ATTENTION_KEY_BLOCK);
        const int32_t high = static_cast<int32_t>(end_key(args, member));
        segments.push_back({static_cast<int32_t>(members.size()), 1,
                            static_cast<int32_t>(member.queries * (args.heads / args.kv_heads)), 0, 1, 0, low, high,
                            false});
        members.push_back(member);
        keys_read += high - low;
        keys_seen += high - low;
    }
}

// Few query rows wait for memory: one task takes all KV heads of a token, whose keys lie side by side, and as many
// parts as leave enough tasks. Many query rows compute: a task for each KV head.
void AttentionPlan::Cut::add_tasks(const AttentionArgs& args) {
    int64_t units = 0;
    for (const Segment& segment : segments) {
        const bool joint = segment.query_rows <= ATTENTION_JOINT_ROWS;
        units += (segment.part_end - segment.part_begin) * (joint ? 1 : args.kv_heads);
        work += static_cast<int64_t>(segment.query_rows) * args.kv_heads * (segment.key_end - segment.key_begin) *
                (args.head_dim + args.v_dim);
    }
    const int64_t wanted = kind.threads * TASKS_PER_THREAD;
    const int64_t parts_per_task = std::min<int64_t>(16, std::max<int64_t>(1, units / wanted));
    const int64_t cuts = units >= wanted ? 1 : round_up_div(wanted, std::max<int64_t>(1, units));
    const int64_t together = std::max<int64_t>(1, JOINT_DIMS / std::max<int64_t>(1, args.head_dim));
    const int64_t fewest = std::clamp<int64_t>(args.kv_heads / (2 * kind.threads), 1, 2); // two are multiplied at once
    const int64_t joint_heads = std::max(fewest, std::min(together, args.kv_heads / cuts));
    for (const Segment& segment : segments) {
        const int64_t heads = segment.query_rows <= ATTENTION_JOINT_ROWS ? joint_heads : 1;
        for (int64_t head = 0; head < args.kv_heads; head += heads) {
            int32_t begin = segment.key_begin;
            for (int64_t part = segment.part_begin; part < segment.part_end; part += parts_per_task) {
                const int64_t last = std::min<int64_t>(segment.part_end, part + parts_per_task);
                const int32_t end =
                    last == segment.part_end ? segment.key_end : static_cast<int32_t>(last * ATTENTION_SPLIT);
                tasks.push_back({members.data() + segment.member_begin, segment.num_members, static_cast<int32_t>(head),
                                 static_cast<int32_t>(std::min(args.kv_heads, head + heads)), begin, end,
                                 segment.first_part, segment.split});
                begin = end;
            }
        }
    }
}

AttentionPlan::AttentionPlan(bool whole) : whole_(whole) {}
AttentionPlan::~AttentionPlan() = default;

void AttentionPlan::reset() {
    for (std::unique_ptr<Cut>& cut : cuts_) {
        if (cut) cut->valid = false;
    }
    used_ = 0;
}

int64_t AttentionPlan::keys_read() const { return cuts_[0] && cuts_[0]->valid ? cuts_[0]->keys_read : 0; }
int64_t AttentionPlan::keys_seen() const { return cuts_[0] && cuts_[0]->valid ? cuts_[0]->keys_seen : 0; }

const AttentionPlan::Cut& AttentionPlan::cut(const AttentionArgs& args) {
    const Kind kind = kind_of(args, whole_);
    for (const std::unique_ptr<Cut>& cut : cuts_) {
        if (cut && cut->valid && cut->kind == kind) return *cut;
    }
    std::unique_ptr<Cut>& place = cuts_[used_++ % KINDS];
    if (!place) place.reset(new Cut);
    place->build(args, whole_);
    return *place;
}

void run_attention(const Kernels& kernels, const AttentionArgs& args, AttentionPlan& plan) {
    const AttentionPlan::Cut& cut = plan.cut(args);
    float* partials =
        reinterpret_cast<float*>(thread_scratch(Scratch::partials, static_cast<size_t>(cut.partial_floats) * 4));
    const size_t scratch_bytes = static_cast<size_t>(kernels.attention_scratch(args));
    const int64_t kv_heads = args.kv_heads;
    for (int64_t row = 0; row < args.num_rows; ++row) {
        for (int64_t head = 0; head < kv_heads; ++head) {
            cut.open[row * kv_heads + head].store(cut.pieces[row], std::memory_order_relaxed);
        }
    }
    std::atomic<bool> valid{true};
    // Whoever brings the last part of a row's KV head adds them up: no second region, no waiting.
    const auto close = [&](const AttentionTask& task) {
        const int32_t done =
            static_cast<int32_t>(round_up_div(task.key_end, ATTENTION_SPLIT) - task.key_begin / ATTENTION_SPLIT);
        for (int32_t i = 0; i < task.num_members; ++i) {
            const int32_t row = task.members[i].row;
            for (int32_t head = task.kv_head_begin; head < task.kv_head_end; ++head) {
                if (cut.open[row * kv_heads + head].fetch_sub(done, std::memory_order_acq_rel) == done) {
                    kernels.attention_merge(args, cut.members[row], head, cut.parts[row], partials);
                }
            }
        }
    };
    const auto body = [&](int64_t i) {
        const AttentionTask& task = cut.tasks[i];
        if (!kernels.attend(args, task, thread_scratch(Scratch::task, scratch_bytes), partials)) {
            valid = false;
        } else if (task.split) {
            close(task);
        }
    };
    const int64_t count = static_cast<int64_t>(cut.tasks.size());
    if (cut.work < SMALL_ATTENTION) {
        for (int64_t i = 0; i < count; ++i) body(i);
    } else {
        parallel_for(count, body);
    }
    if (!valid) out_of_range("page_table");
}

void run_attention(const Kernels& kernels, const AttentionArgs& args) {
    static thread_local AttentionPlan plan;
    plan.reset();
    run_attention(kernels, args, plan);
}

void set_shared_prefix(bool on) { sharing = on; }
bool shared_prefix() { return sharing; }

} // namespace pando
