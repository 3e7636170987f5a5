#include "drivers.hpp"
#include "instruction.hpp"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace pando {

namespace {

struct Embed final : Instruction {
    const char* rows;
    int64_t vocab;

    Embed(const char* rows, int64_t vocab) : rows(rows), vocab(vocab) {}

    void run(const Frame& frame) const override {
        const int64_t* ids = frame.step.input_ids;
        const int64_t bytes = frame.widths[RESIDUAL] * element_bytes(frame.dtype);
        for (int64_t token = 0; token < frame.step.num_tokens; ++token) {
            if (ids[token] < 0 || ids[token] >= vocab) throw std::invalid_argument("input_ids out of range");
            std::memcpy(frame.data[RESIDUAL] + token * bytes, rows + ids[token] * bytes, static_cast<size_t>(bytes));
        }
    }
};

struct Norm final : Instruction {
    int in, out;
    const float* weight;
    float eps;

    Norm(int in, int out, const float* weight, float eps) : in(in), out(out), weight(weight), eps(eps) {}

    void run(const Frame& frame) const override {
        const int64_t size = frame.widths[in];
        run_norm(frame.kernels,
                 {frame.dtype, {frame.data[in], 1, size, 0}, nullptr, weight, frame.data[out], size, eps},
                 frame.step.num_tokens);
    }
};

struct Linear final : Instruction {
    int in, out;
    const PackedWeight* weight;
    bool accumulate;

    Linear(int in, int out, const PackedWeight* weight, bool accumulate)
        : in(in), out(out), weight(weight), accumulate(accumulate) {}

    void run(const Frame& frame) const override {
        run_linear(frame.kernels, {weight, frame.dtype, frame.dtype, frame.data[in], frame.step.num_tokens,
                                   frame.widths[in], frame.data[out], frame.widths[out], accumulate});
    }
};

struct Blend final : Instruction {
    int in, out;
    float factor; // out = out + in, or out * factor where there is no `in`

    Blend(int in, int out, float factor) : in(in), out(out), factor(factor) {}

    void run(const Frame& frame) const override {
        run_blend(frame.kernels,
                  {frame.dtype, in < 0 ? nullptr : frame.data[in], frame.data[out], frame.widths[out], factor},
                  frame.step.num_tokens);
    }
};

struct Heads final : Instruction {
    int qkv;
    HeadsShape shape;

    Heads(int qkv, const HeadsShape& shape) : qkv(qkv), shape(shape) {}

    void run(const Frame& frame) const override {
        const StepArgs& step = frame.step;
        const LayerCache& cache = step.caches[shape.layer];
        const RotaryTable none{nullptr, 0};
        const RotaryTable& rotary = shape.rotary < 0 ? none : step.rotaries[shape.rotary];
        run_heads(frame.kernels,
                  {frame.dtype,
                   frame.data[qkv],
                   frame.widths[qkv],
                   shape.q_heads,
                   shape.kv_heads,
                   shape.head_dim,
                   shape.v_dim,
                   shape.q_norm,
                   shape.k_norm,
                   shape.eps,
                   shape.norm_after_rope,
                   step.positions,
                   rotary.cos_sin,
                   rotary.num_positions,
                   shape.rotary_dim,
                   shape.interleaved,
                   cache.k,
                   cache.v,
                   cache.k_slot_stride,
                   cache.k_head_stride,
                   cache.v_slot_stride,
                   cache.v_head_stride,
                   cache.num_slots,
                   step.groups[cache.group].out_loc,
                   cache.int8_kv},
                  step.num_tokens);
    }
};

struct Attend final : Instruction {
    int qkv, out;
    AttentionShape shape;

    Attend(int qkv, int out, const AttentionShape& shape) : qkv(qkv), out(out), shape(shape) {}

    void run(const Frame& frame) const override {
        const StepArgs& step = frame.step;
        const LayerCache& cache = step.caches[shape.layer];
        const PageTable& table = step.groups[cache.group];
        AttentionArgs args{};
        args.dtype = frame.dtype;
        args.q = frame.data[qkv];
        args.k = cache.k;
        args.v = cache.v;
        args.out = frame.data[out];
        args.q_token_stride = frame.widths[qkv];
        args.q_head_stride = shape.head_dim;
        args.k_slot_stride = cache.k_slot_stride;
        args.k_head_stride = cache.k_head_stride;
        args.v_slot_stride = cache.v_slot_stride;
        args.v_head_stride = cache.v_head_stride;
        args.heads = shape.q_heads;
        args.kv_heads = shape.kv_heads;
        args.head_dim = shape.head_dim;
        args.v_dim = shape.v_dim;
        args.num_slots = cache.num_slots;
        args.page_table = table.pages;
        args.table_stride = table.stride;
        args.table_width = table.width;
        args.cu_q_lens = step.cu_q_lens;
        args.kv_lens = step.kv_lens;
        args.num_rows = step.num_rows;
        args.num_tokens = step.num_tokens;
        args.page_size = step.page_size;
        args.window = shape.window;
        args.scale = shape.scale;
        args.softcap = shape.softcap;
        args.sinks = shape.sinks;
        args.int8_kv = cache.int8_kv;
        run_attention(frame.kernels, args, frame.plan);
    }
};

} // namespace

Program::Program(const Kernels& kernels, DType dtype, int64_t width)
    : kernels_(kernels), dtype_(dtype), widths_{width, width}, workspace_(nullptr, &std::free) {}

Program::~Program() = default;

int Program::buffer(int64_t width) {
    widths_.push_back(width);
    return static_cast<int>(widths_.size()) - 1;
}

void Program::embed(const char* rows, int64_t vocab) {
    if (!instructions_.empty()) throw std::invalid_argument("a program embeds first");
    instructions_.push_back(std::make_unique<Embed>(rows, vocab));
    embeds_ = true;
}

void Program::norm(int in, int out, const float* weight, float eps) {
    if (width(in) != width(out)) throw std::invalid_argument("a norm keeps the width");
    instructions_.push_back(std::make_unique<Norm>(in, out, weight, eps));
}

void Program::linear(int in, int out, const PackedWeight* weight, bool accumulate) {
    const int64_t columns = weight->activation == NO_ACTIVATION ? weight->n : weight->n / 2;
    if (width(in) != weight->k || width(out) != columns) throw std::invalid_argument("the weight does not fit");
    instructions_.push_back(std::make_unique<Linear>(in, out, weight, accumulate));
}

void Program::add(int in, int out) {
    if (width(in) != width(out)) throw std::invalid_argument("a sum keeps the width");
    instructions_.push_back(std::make_unique<Blend>(in, out, 1.0f));
}

void Program::scale(int buffer, float factor) {
    width(buffer);
    instructions_.push_back(std::make_unique<Blend>(-1, buffer, factor));
}

void Program::heads(int qkv, const HeadsShape& shape) {
    // A gate on the output may follow.
    if (width(qkv) < (shape.q_heads + shape.kv_heads) * shape.head_dim + shape.kv_heads * shape.v_dim) {
        throw std::invalid_argument("the heads do not fit");
    }
    instructions_.push_back(std::make_unique<Heads>(qkv, shape));
}

void Program::attend(int qkv, int out, const AttentionShape& shape) {
    if (width(out) != shape.q_heads * shape.v_dim) throw std::invalid_argument("the output does not fit");
    instructions_.push_back(std::make_unique<Attend>(qkv, out, shape));
}

void Program::run(const StepArgs& step) {
    const auto bytes_of = [&](int64_t width) {
        return (static_cast<size_t>(width * step.num_tokens * element_bytes(dtype_)) + 63) / 64 * 64;
    };
    if (embeds_ == (step.input_ids == nullptr)) throw std::invalid_argument("a program embeds, or its caller does");
    size_t bytes = embeds_ ? bytes_of(widths_[RESIDUAL]) : 0;
    for (size_t i = 2; i < widths_.size(); ++i) bytes += bytes_of(widths_[i]);
    if (bytes > workspace_bytes_) {
        void* fresh = nullptr;
        if (posix_memalign(&fresh, 4096, bytes) != 0) throw std::bad_alloc();
        workspace_.reset(static_cast<char*>(fresh));
        workspace_bytes_ = bytes;
    }
    std::vector<char*> data{step.residual, step.result};
    char* next = workspace_.get();
    if (embeds_) {
        data[RESIDUAL] = next;
        next += bytes_of(widths_[RESIDUAL]);
    }
    for (size_t i = 2; i < widths_.size(); ++i) {
        data.push_back(next);
        next += bytes_of(widths_[i]);
    }
    plan_.reset();
    const Frame frame{kernels_, step, dtype_, widths_.data(), data.data(), plan_};
    for (const auto& instruction : instructions_) instruction->run(frame);
}

} // namespace pando
