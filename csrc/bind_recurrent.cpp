// The Python face of the recurrent ops.
#include "bind_recurrent.hpp"
#include "bind.hpp"
#include "isa.hpp"
#include "recurrent.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <tuple>
#include <utility>

namespace nb = nanobind;

namespace pando {

namespace {

using Strides = std::pair<int64_t, int64_t>; // (token, head)

// Rows, tokens, slots, saves; cu_q_lens, slots, fresh, save_token, save_slot.
using Ragged = std::tuple<int64_t, int64_t, int64_t, int64_t, Pointer, Pointer, Pointer, Pointer, Pointer>;

RecurrentStep step_of(const Ragged& ragged) {
    const auto& [rows, tokens, num_slots, saves, cu_q_lens, slots, fresh, save_token, save_slot] = ragged;
    return {at<const int32_t>(cu_q_lens),
            at<const int64_t>(slots),
            at<const uint8_t>(fresh),
            rows,
            tokens,
            num_slots,
            at<const int64_t>(save_token),
            at<const int64_t>(save_slot),
            saves};
}

void causal_conv(int level, int dtype, Pointer x, int64_t token_stride, Pointer weight, Pointer bias, Pointer state,
                 int64_t slot_stride, Pointer out, int64_t channels, int64_t taps, bool silu, const Ragged& ragged) {
    const ConvArgs args{static_cast<DType>(dtype),
                        at<const char>(x),
                        token_stride,
                        at<const float>(weight),
                        at<const float>(bias),
                        at<char>(state),
                        slot_stride,
                        at<char>(out),
                        channels,
                        taps,
                        silu};
    const RecurrentStep step = step_of(ragged);
    const Unlocked unlocked(step.num_tokens * channels);
    run_conv(level_kernels(level), args, step);
}

void gated_delta(int level, int dtype, Pointer q, Strides q_strides, Pointer k, Strides k_strides, Pointer v,
                 Strides v_strides, Pointer log_decay, Pointer beta, Pointer state, int64_t slot_stride, Pointer out,
                 int64_t key_heads, int64_t value_heads, int64_t key_dim, int64_t value_dim, bool channels,
                 bool normalize, float scale, const Ragged& ragged) {
    const DeltaArgs args{static_cast<DType>(dtype),
                         at<const char>(q),
                         at<const char>(k),
                         at<const char>(v),
                         q_strides.first,
                         q_strides.second,
                         k_strides.first,
                         k_strides.second,
                         v_strides.first,
                         v_strides.second,
                         at<const float>(log_decay),
                         at<const float>(beta),
                         at<float>(state),
                         slot_stride,
                         at<char>(out),
                         key_heads,
                         value_heads,
                         key_dim,
                         value_dim,
                         channels,
                         normalize,
                         scale};
    const RecurrentStep step = step_of(ragged);
    const Unlocked unlocked(step.num_tokens * value_heads * key_dim * value_dim / 8);
    run_delta(level_kernels(level), args, step);
}

void state_space(int level, int dtype, Pointer x, Strides x_strides, Pointer b, Strides b_strides, Pointer c,
                 Strides c_strides, Pointer dt, Pointer a, Pointer d, Pointer state, int64_t slot_stride, Pointer out,
                 int64_t heads, int64_t groups, int64_t head_dim, int64_t state_size, const Ragged& ragged) {
    const SpaceArgs args{static_cast<DType>(dtype),
                         at<const char>(x),
                         at<const char>(b),
                         at<const char>(c),
                         x_strides.first,
                         x_strides.second,
                         b_strides.first,
                         b_strides.second,
                         c_strides.first,
                         c_strides.second,
                         at<const float>(dt),
                         at<const float>(a),
                         at<const float>(d),
                         at<float>(state),
                         slot_stride,
                         at<char>(out),
                         heads,
                         groups,
                         head_dim,
                         state_size};
    const RecurrentStep step = step_of(ragged);
    const Unlocked unlocked(step.num_tokens * heads * head_dim * state_size / 8);
    run_space(level_kernels(level), args, step);
}

void selective_scan(int level, int dtype, Pointer x, int64_t x_stride, Pointer b, int64_t b_stride, Pointer c,
                    int64_t c_stride, Pointer dt, Pointer a, Pointer d, Pointer state, int64_t slot_stride, Pointer out,
                    int64_t channels, int64_t state_size, const Ragged& ragged) {
    const SelectiveArgs args{static_cast<DType>(dtype),
                             at<const char>(x),
                             at<const char>(b),
                             at<const char>(c),
                             x_stride,
                             b_stride,
                             c_stride,
                             at<const float>(dt),
                             at<const float>(a),
                             at<const float>(d),
                             at<float>(state),
                             slot_stride,
                             at<char>(out),
                             channels,
                             state_size};
    const RecurrentStep step = step_of(ragged);
    const Unlocked unlocked(step.num_tokens * channels * state_size / 2);
    run_selective(level_kernels(level), args, step);
}

} // namespace

void define_recurrent(nb::module_& m) {
    m.attr("max_taps") = MAX_TAPS;
    m.def("causal_conv", &causal_conv);
    m.def("gated_delta", &gated_delta);
    m.def("state_space", &state_space);
    m.def("selective_scan", &selective_scan);
}

} // namespace pando
