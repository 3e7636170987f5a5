// Instructions beyond the plain decoder's: other norms, gates, mixtures of experts, recurrent mixers.
#include "drivers.hpp"
#include "experts.hpp"
#include "instruction.hpp"

#include <stdexcept>
#include <vector>

namespace pando {

namespace {

struct Normalize final : Instruction {
    int in, out;
    int64_t in_offset, out_offset;
    NormalizeShape shape;

    Normalize(int in, int64_t in_offset, int out, int64_t out_offset, const NormalizeShape& shape)
        : in(in), out(out), in_offset(in_offset), out_offset(out_offset), shape(shape) {}

    void run(const Frame& frame) const override {
        run_normalize(frame.kernels,
                      {frame.dtype, frame.at(in, in_offset), frame.at(out, out_offset), frame.widths[in],
                       frame.widths[out], shape.groups, shape.size, shape.weight, shape.bias, shape.weight_stride,
                       shape.eps, shape.centered},
                      frame.step.num_tokens);
    }
};

struct Modulate final : Instruction {
    int in, out;
    int64_t offset;
    Modulation kind;
    bool broadcast;

    Modulate(int in, int64_t offset, int out, Modulation kind, bool broadcast)
        : in(in), out(out), offset(offset), kind(kind), broadcast(broadcast) {}

    void run(const Frame& frame) const override {
        run_modulate(frame.kernels,
                     {frame.dtype, kind, frame.at(in, offset), frame.data[out], frame.widths[in], broadcast ? 0 : 1,
                      frame.widths[out], frame.widths[out]},
                     frame.step.num_tokens);
    }
};

struct Mixture final : Instruction {
    int in, logits, out;
    RouteShape shape;
    const PackedExperts* experts;
    mutable std::vector<int64_t> ids; // a program is not reentrant
    mutable std::vector<float> weights;

    Mixture(int in, int logits, int out, const RouteShape& shape, const PackedExperts* experts)
        : in(in), logits(logits), out(out), shape(shape), experts(experts) {}

    void run(const Frame& frame) const override {
        const int64_t tokens = frame.step.num_tokens;
        ids.resize(static_cast<size_t>(tokens * shape.top_k));
        weights.resize(ids.size());
        run_route(frame.kernels, {frame.dtype, frame.data[logits], shape, ids.data(), weights.data()}, tokens);
        run_experts(frame.kernels,
                    {experts->gate_up.data(), experts->down.data(), shape.experts, frame.dtype, frame.data[in], tokens,
                     frame.widths[in], ids.data(), weights.data(), shape.top_k, frame.data[out], frame.widths[out]});
    }
};

struct GatedNorm final : Instruction {
    int y, z;
    int64_t offset;
    GatedNormShape shape;

    GatedNorm(int y, int z, int64_t offset, const GatedNormShape& shape) : y(y), z(z), offset(offset), shape(shape) {}

    void run(const Frame& frame) const override {
        run_gated_norm(frame.kernels,
                       {frame.dtype, frame.data[y], frame.at(z, offset), frame.widths[y], frame.widths[z],
                        frame.widths[y] / shape.size, shape.size, shape.weight, shape.weight_stride, shape.eps,
                        shape.gate_first},
                       frame.step.num_tokens);
    }
};

// The step's rows, for the states of one layer.
RecurrentStep rows_of(const StepArgs& step, const LayerState& state) {
    const StateRows& rows = step.state_rows;
    if (rows.slots == nullptr && step.num_rows > 0) throw std::invalid_argument("a step without states");
    return {step.cu_q_lens,  rows.slots,      rows.fresh,     step.num_rows, step.num_tokens,
            state.num_slots, rows.save_token, rows.save_slot, rows.num_saves};
}

struct Conv final : Instruction {
    int in, out;
    int64_t offset;
    ConvShape shape;

    Conv(int in, int64_t offset, int out, const ConvShape& shape) : in(in), out(out), offset(offset), shape(shape) {}

    void run(const Frame& frame) const override {
        const LayerState& state = frame.step.states[shape.state];
        run_conv(frame.kernels,
                 {frame.dtype, frame.at(in, offset), frame.widths[in], shape.weight, shape.bias, state.data,
                  state.slot_stride, frame.data[out], frame.widths[out], shape.taps, shape.silu},
                 rows_of(frame.step, state));
    }
};

struct Delta final : Instruction {
    int qkv, gates, out;
    DeltaShape shape;
    mutable std::vector<float> decay, beta;

    Delta(int qkv, int gates, int out, const DeltaShape& shape) : qkv(qkv), gates(gates), out(out), shape(shape) {}

    void run(const Frame& frame) const override {
        const int64_t tokens = frame.step.num_tokens, heads = shape.value_heads;
        decay.resize(static_cast<size_t>(tokens * heads));
        beta.resize(decay.size());
        const float most = __builtin_inff();
        run_gates(frame.kernels,
                  {frame.dtype, frame.at(gates, 0), 2 * heads, heads, nullptr, nullptr, -most, most, beta.data()},
                  tokens);
        run_gates(frame.kernels,
                  {frame.dtype, frame.at(gates, heads), 2 * heads, heads, shape.rate, shape.dt_bias, -most, most,
                   decay.data()},
                  tokens);
        const LayerState& state = frame.step.states[shape.state];
        const int64_t keys = shape.key_heads * shape.key_dim, stride = frame.widths[qkv];
        run_delta(frame.kernels,
                  {frame.dtype,
                   frame.at(qkv, 0),
                   frame.at(qkv, keys),
                   frame.at(qkv, 2 * keys),
                   stride,
                   shape.key_dim,
                   stride,
                   shape.key_dim,
                   stride,
                   shape.value_dim,
                   decay.data(),
                   beta.data(),
                   reinterpret_cast<float*>(state.data),
                   state.slot_stride,
                   frame.data[out],
                   shape.key_heads,
                   heads,
                   shape.key_dim,
                   shape.value_dim,
                   false,
                   true,
                   shape.scale},
                  rows_of(frame.step, state));
    }
};

struct Space final : Instruction {
    int xbc, projected, out;
    SpaceShape shape;
    mutable std::vector<float> dt;

    Space(int xbc, int projected, int out, const SpaceShape& shape)
        : xbc(xbc), projected(projected), out(out), shape(shape) {}

    void run(const Frame& frame) const override {
        const int64_t tokens = frame.step.num_tokens;
        dt.resize(static_cast<size_t>(tokens * shape.heads));
        run_gates(frame.kernels,
                  {frame.dtype, frame.at(projected, shape.dt_offset), frame.widths[projected], shape.heads, nullptr,
                   shape.dt_bias, shape.dt_low, shape.dt_high, dt.data()},
                  tokens);
        const LayerState& state = frame.step.states[shape.state];
        const int64_t width = shape.heads * shape.head_dim, b = shape.groups * shape.state_size;
        const int64_t stride = frame.widths[xbc];
        run_space(frame.kernels,
                  {frame.dtype,
                   frame.at(xbc, 0),
                   frame.at(xbc, width),
                   frame.at(xbc, width + b),
                   stride,
                   shape.head_dim,
                   stride,
                   shape.state_size,
                   stride,
                   shape.state_size,
                   dt.data(),
                   shape.a,
                   shape.d,
                   reinterpret_cast<float*>(state.data),
                   state.slot_stride,
                   frame.data[out],
                   shape.heads,
                   shape.groups,
                   shape.head_dim,
                   shape.state_size},
                  rows_of(frame.step, state));
    }
};

void require(bool fits, const char* what) {
    if (!fits) throw std::invalid_argument(what);
}

} // namespace

void Program::normalize(int in, int64_t in_offset, int out, int64_t out_offset, const NormalizeShape& shape) {
    const int64_t size = shape.groups * shape.size;
    require(in_offset + size <= width(in) && out_offset + size <= width(out), "the norm does not fit");
    instructions_.push_back(std::make_unique<Normalize>(in, in_offset, out, out_offset, shape));
}

void Program::modulate(int in, int64_t offset, int out, Modulation kind, bool broadcast) {
    require(offset + (broadcast ? 1 : width(out)) <= width(in), "the gate does not fit");
    instructions_.push_back(std::make_unique<Modulate>(in, offset, out, kind, broadcast));
}

void Program::mixture(int in, int logits, int out, const RouteShape& shape, const PackedExperts* experts) {
    require(shape.experts <= MAX_ROUTED && width(logits) == shape.experts &&
                static_cast<int64_t>(experts->gate_up.size()) == shape.experts && shape.top_k <= shape.experts,
            "the experts do not fit");
    require(width(in) == experts->gate_up[0].k && width(out) == experts->down[0].n, "the experts do not fit");
    instructions_.push_back(std::make_unique<Mixture>(in, logits, out, shape, experts));
}

void Program::gated_norm(int y, int z, int64_t offset, const GatedNormShape& shape) {
    require(width(y) % shape.size == 0 && offset + width(y) <= width(z), "the gated norm does not fit");
    instructions_.push_back(std::make_unique<GatedNorm>(y, z, offset, shape));
}

void Program::conv(int in, int64_t offset, int out, const ConvShape& shape) {
    require(offset + width(out) <= width(in), "the convolution does not fit");
    instructions_.push_back(std::make_unique<Conv>(in, offset, out, shape));
}

void Program::delta(int qkv, int gates, int out, const DeltaShape& shape) {
    const int64_t values = shape.value_heads * shape.value_dim;
    require(width(qkv) == 2 * shape.key_heads * shape.key_dim + values && width(gates) == 2 * shape.value_heads &&
                width(out) == values,
            "the delta rule does not fit");
    instructions_.push_back(std::make_unique<Delta>(qkv, gates, out, shape));
}

void Program::space(int xbc, int projected, int out, const SpaceShape& shape) {
    const int64_t values = shape.heads * shape.head_dim;
    require(width(xbc) == values + 2 * shape.groups * shape.state_size && width(out) == values &&
                shape.dt_offset + shape.heads <= width(projected),
            "the state space does not fit");
    instructions_.push_back(std::make_unique<Space>(xbc, projected, out, shape));
}

} // namespace pando
