#include "drivers.hpp"

#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pando {

namespace {

// Elements of an elementwise piece: some microseconds of work, several times what waking a thread costs.
constexpr int64_t PIECE = 1 << 15;

// Tokens of a sampling call below which it runs on the caller alone.
constexpr int64_t SMALL_SAMPLE = 1 << 15;

template <class Body>
void for_each(int64_t n, bool small, const Body& body) {
    if (small) {
        for (int64_t i = 0; i < n; ++i) body(i);
    } else {
        parallel_for(n, body);
    }
}

template <class Range>
void over_rows(int64_t rows, int64_t row_size, const Range& range) {
    const int64_t per_piece = std::max<int64_t>(1, PIECE / std::max<int64_t>(1, row_size));
    const int64_t pieces = (rows + per_piece - 1) / per_piece;
    parallel_for(pieces, [&](int64_t i) { range(i * per_piece, std::min(rows, (i + 1) * per_piece)); });
}

[[noreturn]] void out_of_range(const char* what) { throw std::invalid_argument(std::string(what) + " out of range"); }

void penalise(const PenaltyArgs& args, int64_t row) {
    constexpr uint32_t SEEN = 1u << 31;
    float* logits = args.logits + row * args.vocab;
    const int32_t* history = args.history + row * args.history_stride;
    const int32_t len = args.lens[row], prompt_len = args.prompt_lens[row];
    const float repetition = args.repetition[row], frequency = args.frequency[row], presence = args.presence[row];
    if (repetition == 1.0f && frequency == 0.0f && presence == 0.0f) return;
    uint32_t* marks = reinterpret_cast<uint32_t*>(zeroed_scratch(static_cast<size_t>(args.vocab) * 4));
    for (int32_t i = 0; i < len; ++i) {
        const int32_t token = history[i];
        if (!(marks[token] & SEEN)) {
            marks[token] |= SEEN;
            float& x = logits[token];
            x = x > 0.0f ? x / repetition : x * repetition;
        }
        marks[token] += i >= prompt_len;
    }
    for (int32_t i = 0; i < len; ++i) {
        const uint32_t count = marks[history[i]] & ~SEEN;
        if (count > 0) {
            logits[history[i]] -= frequency * static_cast<float>(count);
            logits[history[i]] -= presence;
        }
        marks[history[i]] = 0;
    }
}

bool tokens_valid(const int32_t* tokens, int64_t n, int64_t vocab) {
    bool valid = true;
    for (int64_t i = 0; i < n; ++i) valid &= tokens[i] >= 0 && tokens[i] < vocab;
    return valid;
}

} // namespace

void run_norm(const Kernels& kernels, const NormArgs& args, int64_t rows) {
    over_rows(rows, args.size, [&](int64_t begin, int64_t end) { kernels.norm(args, begin, end); });
}

void run_rope(const Kernels& kernels, const RopeArgs& args, int64_t tokens) {
    std::atomic<bool> valid{true};
    over_rows(tokens, (args.q_heads + args.k_heads) * args.rotary_dim, [&](int64_t begin, int64_t end) {
        if (!kernels.rope(args, begin, end)) valid = false;
    });
    if (!valid) out_of_range("positions");
}

void run_heads(const Kernels& kernels, const HeadsArgs& args, int64_t tokens) {
    for (int64_t token = 0; token < tokens; ++token) {
        if (args.out_loc[token] < 0 || args.out_loc[token] >= args.num_slots) out_of_range("out_loc");
    }
    std::atomic<bool> valid{true};
    over_rows(tokens, args.token_stride, [&](int64_t begin, int64_t end) {
        if (!kernels.heads(args, begin, end)) valid = false;
    });
    if (!valid) out_of_range("positions");
}

void run_blend(const Kernels& kernels, const BlendArgs& args, int64_t rows) {
    over_rows(rows, args.size, [&](int64_t begin, int64_t end) { kernels.blend(args, begin, end); });
}

void run_activation(const Kernels& kernels, const ActivationArgs& args, int64_t rows) {
    over_rows(rows, args.size, [&](int64_t begin, int64_t end) { kernels.activation(args, begin, end); });
}

void run_store(const Kernels& kernels, const StoreArgs& args, int64_t tokens) {
    const int64_t width = args.dtype == DType::f32 ? 4 : 2, cached = args.int8_kv ? 1 : width;
    const auto put = [&](char* row, const char* x, int64_t dim) {
        if (args.int8_kv) {
            kernels.round_kv(args.dtype, x, dim, row);
        } else {
            std::memcpy(row, x, static_cast<size_t>(dim * width));
        }
    };
    for (int64_t token = 0; token < tokens; ++token) {
        if (args.out_loc[token] < 0 || args.out_loc[token] >= args.num_slots) out_of_range("out_loc");
    }
    over_rows(tokens, args.heads * (args.k_dim + args.v_dim), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t slot = args.out_loc[token];
            for (int64_t head = 0; head < args.heads; ++head) {
                put(args.k_cache + (slot * args.k_slot_stride + head * args.k_slot_head_stride) * cached,
                    args.k + (token * args.k_token_stride + head * args.k_head_stride) * width, args.k_dim);
                put(args.v_cache + (slot * args.v_slot_stride + head * args.v_slot_head_stride) * cached,
                    args.v + (token * args.v_token_stride + head * args.v_head_stride) * width, args.v_dim);
            }
        }
    });
}

void run_normalize(const Kernels& kernels, const NormalizeArgs& args, int64_t rows) {
    over_rows(rows, args.groups * args.size, [&](int64_t begin, int64_t end) { kernels.normalize(args, begin, end); });
}

void run_modulate(const Kernels& kernels, const ModulateArgs& args, int64_t rows) {
    over_rows(rows, args.size, [&](int64_t begin, int64_t end) { kernels.modulate(args, begin, end); });
}

void run_gated_norm(const Kernels& kernels, const GatedNormArgs& args, int64_t rows) {
    over_rows(rows, args.groups * args.size, [&](int64_t begin, int64_t end) { kernels.gated_norm(args, begin, end); });
}

void run_gates(const Kernels& kernels, const GatesArgs& args, int64_t rows) {
    over_rows(rows, args.size * 8, [&](int64_t begin, int64_t end) { kernels.gates(args, begin, end); });
}

void run_route(const Kernels& kernels, const RouteArgs& args, int64_t rows) {
    over_rows(rows, args.shape.experts * (args.shape.top_k + 1),
              [&](int64_t begin, int64_t end) { kernels.route(args, begin, end); });
}

void run_sample(const Kernels& kernels, const SampleArgs& args, int64_t rows) {
    const size_t bytes = static_cast<size_t>(kernels.sample_scratch(args));
    for_each(rows, rows * args.vocab < SMALL_SAMPLE,
             [&](int64_t row) { kernels.sample(args, row, thread_scratch(Scratch::task, bytes)); });
}

void run_penalties(const PenaltyArgs& args, int64_t rows) {
    int64_t tokens = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t len = args.lens[row];
        tokens += len;
        if (len < 0 || len > args.history_len) out_of_range("lens");
        if (!tokens_valid(args.history + row * args.history_stride, len, args.vocab)) out_of_range("history");
    }
    for_each(rows, tokens < SMALL_SAMPLE, [&](int64_t row) { penalise(args, row); });
}

void run_scan(const Kernels& kernels, const ScanArgs& args, int64_t rows) {
    over_rows(rows, args.vocab, [&](int64_t begin, int64_t end) { kernels.scan(args, begin, end); });
}

void run_mask(const Kernels& kernels, const MaskArgs& args, int64_t rows) {
    over_rows(rows, args.vocab, [&](int64_t begin, int64_t end) { kernels.mask(args, begin, end); });
}

void run_logprobs(const Kernels& kernels, const LogprobArgs& args, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
        if (args.token_ids[row] < 0 || args.token_ids[row] >= args.vocab) out_of_range("token_ids");
    }
    over_rows(rows, args.vocab, [&](int64_t begin, int64_t end) { kernels.logprob(args, begin, end); });
}

} // namespace pando
