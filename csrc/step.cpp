#include "step.hpp"

#include "drivers.hpp"
#include "threads.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace pando {

namespace {

// Logits looked at by one thread at a time, a multiple of what the leaf looks at; and the number worth waking one for.
constexpr int64_t SCAN_PIECE = 1 << 13, SCAN_SMALL = 1 << 15;

[[noreturn]] void out_of_range(const char* what) { throw std::invalid_argument(std::string(what) + " out of range"); }

bool is_inside(int64_t index, int64_t size) { return index >= 0 && index < size; }

void check_rows(const FlattenArgs& args) {
    int64_t tokens = 0, emitting = 0;
    const TableView& pages = args.groups[0].pages;
    for (int64_t row = 0; row < args.rows; ++row) {
        const int64_t start = args.starts[row], len = args.lens[row], most = pages.width * args.page_size;
        if (!is_inside(args.slots[row], std::min(args.tokens.rows, pages.rows))) out_of_range("slot");
        if (start < 0 || len < 0 || len > args.tokens.width - start || len > most - start) out_of_range("positions");
        if (args.emits[row] < 0 || args.emits[row] > len) out_of_range("emitting positions");
        tokens += len;
        emitting += args.emits[row];
    }
    if (tokens != args.num_tokens || emitting != args.num_emitting) {
        throw std::invalid_argument("the outputs do not fit the rows");
    }
}

// The token and position of every position a row runs, from entry `at` of the outputs on.
void flatten_row(const FlattenArgs& args, int64_t row, int64_t at) {
    const int32_t* tokens = args.tokens.row(args.slots[row]);
    const int64_t start = args.starts[row], end = start + args.lens[row];
    for (int64_t position = start; position < end; ++position, ++at) {
        args.input_ids[at] = tokens[position];
        args.positions[at] = position;
    }
}

// Where they lie in the pools of one group, and the row's pages of it.
void place_row(const FlattenArgs& args, const PageGroup& group, int64_t row, int64_t at) {
    const int32_t* pages = group.pages.row(args.slots[row]);
    const int64_t start = args.starts[row], end = at + args.lens[row];
    int64_t page = start / args.page_size, offset = start % args.page_size;
    for (; at < end; ++at) {
        group.out_loc[at] = pages[page] * args.page_size + offset;
        if (++offset == args.page_size) {
            offset = 0;
            ++page;
        }
    }
    std::memcpy(group.page_table.row(row), pages, static_cast<size_t>(group.page_table.width) * 4);
}

// The best of the pieces of a row, in order: the lowest id on a tie, 0 if no logit is a number.
struct Best {
    float value = -std::numeric_limits<float>::infinity();
    int64_t id = 0;
    bool finite = true;

    void add(const ChooseArgs& args, int64_t row, int64_t begin, int64_t found, bool is_finite) {
        const float value_found = args.logits[row * args.vocab + begin + found];
        if (value_found > value) {
            value = value_found;
            id = begin + found;
        }
        finite = finite && is_finite;
    }
};

// Finite or not, and the largest logit of greedy rows. A large vocabulary is looked at in pieces.
void scan_logits(const Kernels& kernels, const ChooseArgs& args) {
    const int64_t pieces = (args.vocab + SCAN_PIECE - 1) / SCAN_PIECE, count = args.rows * pieces;
    const bool greedy = args.greedy;
    char* room = thread_scratch(Scratch::plan, static_cast<size_t>(count * 9));
    int64_t* found = reinterpret_cast<int64_t*>(room);
    uint8_t* finite = reinterpret_cast<uint8_t*>(found + count);
    const auto scan = [&](int64_t i) {
        const int64_t row = i / pieces, begin = i % pieces * SCAN_PIECE,
                      size = std::min(SCAN_PIECE, args.vocab - begin);
        kernels.scan({args.logits + row * args.vocab + begin, size, greedy ? found + i : nullptr, finite + i}, 0, 1);
    };
    if (args.rows * args.vocab < SCAN_SMALL) {
        for (int64_t i = 0; i < count; ++i) scan(i);
    } else {
        parallel_for(count, scan);
    }
    for (int64_t row = 0; row < args.rows; ++row) {
        Best best;
        for (int64_t i = 0; i < pieces; ++i) {
            const int64_t at = row * pieces + i;
            best.add(args, row, i * SCAN_PIECE, greedy ? found[at] : 0, finite[at] != 0);
        }
        if (greedy) args.tokens[row] = best.id;
        args.finite[row] = best.finite;
    }
}

// The sampling parameters of the rows, next to each other. All zero, which is greedy, if every row is.
SampleArgs sampling_of(const ChooseArgs& args) {
    const int64_t rows = args.rows;
    char* room = thread_scratch(Scratch::partials, static_cast<size_t>(rows * 24));
    int64_t* seeds = reinterpret_cast<int64_t*>(room);
    float* temperature = reinterpret_cast<float*>(seeds + rows);
    float* top_p = temperature + rows;
    float* min_p = top_p + rows;
    int32_t* top_k = reinterpret_cast<int32_t*>(min_p + rows);
    if (args.greedy) {
        std::memset(room, 0, static_cast<size_t>(rows * 24));
    } else {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t slot = args.slots[row];
            seeds[row] = args.sampling.seed[slot];
            temperature[row] = args.sampling.temperature[slot];
            top_p[row] = args.sampling.top_p[slot];
            min_p[row] = args.sampling.min_p[slot];
            top_k[row] = args.sampling.top_k[slot];
        }
    }
    return {args.logits, args.vocab, temperature, top_k, top_p, min_p, seeds, args.positions, args.tokens};
}

// What a mask allows, next to each other and in order: logits and ids. Returns how many.
int64_t gather_allowed(const float* logits, const int32_t* words, int64_t vocab, float* values, int32_t* ids) {
    int64_t count = 0;
    for (int64_t at = 0; at < vocab; at += 32) {
        const int64_t size = std::min<int64_t>(32, vocab - at);
        uint32_t bits = static_cast<uint32_t>(words[at / 32]);
        if (size < 32) bits &= (1u << size) - 1;
        if (bits == 0xffffffffu) {
            for (int32_t i = 0; i < 32; ++i) {
                values[count + i] = logits[at + i];
                ids[count + i] = static_cast<int32_t>(at) + i;
            }
            count += 32;
            continue;
        }
        for (; bits != 0; bits &= bits - 1, ++count) {
            const int64_t id = at + __builtin_ctz(bits);
            values[count] = logits[id];
            ids[count] = static_cast<int32_t>(id);
        }
    }
    return count;
}

// A row's token among those that its mask allows; 0 if there are none. The others are never looked at: a grammar mostly
// allows few of a large vocabulary.
void sample_allowed(const Kernels& kernels, const SampleArgs& all, const int32_t* words, int64_t row) {
    const int64_t vocab = all.vocab, part = (vocab * 4 + 63) / 64 * 64;
    char* room = thread_scratch(Scratch::task, static_cast<size_t>(2 * part + kernels.sample_scratch(all)));
    float* values = reinterpret_cast<float*>(room);
    int32_t* ids = reinterpret_cast<int32_t*>(room + part);
    const int64_t count = gather_allowed(all.logits + row * vocab, words, vocab, values, ids);
    int64_t found = 0;
    if (count > 1) {
        const SampleArgs one{values,          count,           all.temperature + row, all.top_k + row, all.top_p + row,
                             all.min_p + row, all.seeds + row, all.positions + row,   &found};
        kernels.sample(one, 0, room + 2 * part);
    }
    all.out[row] = count > 0 ? ids[found] : 0;
}

// Tokens of the rows that have masks, and of all rows that are not greedy.
void sample_rows(const Kernels& kernels, const ChooseArgs& args) {
    const AllowedTokens& allowed = args.allowed;
    const SampleArgs all = sampling_of(args);
    if (allowed.count == 0) {
        run_sample(kernels, all, args.rows);
        return;
    }
    const int32_t** words = reinterpret_cast<const int32_t**>(
        thread_scratch(Scratch::plan, static_cast<size_t>(args.rows) * sizeof(int32_t*)));
    std::fill_n(words, args.rows, nullptr);
    for (int64_t i = 0; i < allowed.count; ++i) words[allowed.rows[i]] = allowed.words + i * allowed.stride;
    const auto choose_row = [&](int64_t row) {
        if (words[row] != nullptr) {
            sample_allowed(kernels, all, words[row], row);
        } else if (!args.greedy) {
            kernels.sample(all, row, thread_scratch(Scratch::task, static_cast<size_t>(kernels.sample_scratch(all))));
        }
    };
    if (args.rows * args.vocab < SCAN_SMALL) {
        for (int64_t row = 0; row < args.rows; ++row) choose_row(row);
    } else {
        parallel_for(args.rows, choose_row);
    }
}

} // namespace

void write_pages(const PageWriteArgs& args) {
    const TableView& pages = args.groups[0].pages;
    for (int64_t i = 0; i < args.count; ++i) {
        if (args.of != nullptr && !is_inside(args.of[i], args.num_groups)) out_of_range("group");
        if (!is_inside(args.slots[i], pages.rows)) out_of_range("slot");
        if (!is_inside(args.indices[i], pages.width)) out_of_range("page index");
    }
    for (int64_t i = 0; i < args.count; ++i) {
        const PageGroup& group = args.groups[args.of == nullptr ? 0 : args.of[i]];
        group.pages.row(args.slots[i])[args.indices[i]] = static_cast<int32_t>(args.ids[i]);
    }
}

void write_tokens(const TokenWriteArgs& args) {
    for (int64_t i = 0; i < args.count; ++i) {
        if (!is_inside(args.slots[i], args.history.rows)) out_of_range("slot");
        if (!is_inside(args.positions[i], args.history.width)) out_of_range("position");
    }
    for (int64_t i = 0; i < args.count; ++i) {
        args.history.row(args.slots[i])[args.positions[i]] = static_cast<int32_t>(args.ids[i]);
    }
}

void flatten(const FlattenArgs& args) {
    check_rows(args);
    int64_t at = 0, emitting = 0;
    args.cu_q_lens[0] = 0;
    for (int64_t row = 0; row < args.rows; ++row) {
        const int64_t slot = args.slots[row], end = args.starts[row] + args.lens[row];
        flatten_row(args, row, at);
        for (int64_t group = 0; group < args.num_groups; ++group) place_row(args, args.groups[group], row, at);
        at += args.lens[row];
        args.cu_q_lens[row + 1] = static_cast<int32_t>(at);
        args.kv_lens[row] = static_cast<int32_t>(end);
        for (int64_t left = args.emits[row] - 1; left >= 0; --left) {
            args.last[emitting] = at - 1 - left;
            args.emit_slots[emitting] = slot;
            args.emit_ends[emitting++] = end - left;
        }
    }
}

void choose(const Kernels& kernels, const ChooseArgs& args) {
    for (int64_t row = 0; row < args.rows; ++row) {
        if (!is_inside(args.slots[row], args.history.rows)) out_of_range("slot");
        if (!is_inside(args.positions[row], args.history.width)) out_of_range("position");
    }
    if (args.vocab == 0) throw std::invalid_argument("no logits");
    for (int64_t i = 0; i < args.allowed.count; ++i) {
        if (!is_inside(args.allowed.rows[i], args.rows)) out_of_range("masked row");
    }
    scan_logits(kernels, args);
    if (!args.greedy || args.allowed.count > 0) sample_rows(kernels, args);
    for (int64_t row = 0; row < args.rows; ++row) {
        args.history.row(args.slots[row])[args.positions[row]] = static_cast<int32_t>(args.tokens[row]);
    }
}

} // namespace pando
