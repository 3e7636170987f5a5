// The Python face of the kernels: plain integers in (pointers, sizes, strides in elements), nothing kept, nothing
// allocated for Python. pando.kernels.cpu is the only caller and checks dtypes, devices and layouts first.
#include "bind.hpp"
#include "bind_program.hpp"
#include "bind_recurrent.hpp"
#include "bind_step.hpp"
#include "checksum.hpp"
#include "drivers.hpp"
#include "experts.hpp"
#include "isa.hpp"
#include "linear_int.hpp"
#include "threads.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace pando;

namespace {

void norm(int level, int dtype, Pointer x, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
          int64_t size, Pointer residual, Pointer weight, Pointer out, float eps) {
    const NormArgs args{static_cast<DType>(dtype),
                        {at<char>(x), inner, outer_stride, inner_stride},
                        at<char>(residual),
                        at<const float>(weight),
                        at<char>(out),
                        size,
                        eps};
    const Unlocked unlocked(rows * size);
    run_norm(level_kernels(level), args, rows);
}

void rope(int level, int dtype, Pointer q, int64_t q_token_stride, int64_t q_head_stride, int64_t q_heads, Pointer k,
          int64_t k_token_stride, int64_t k_head_stride, int64_t k_heads, int64_t tokens, Pointer positions,
          Pointer cos_sin, int64_t max_position, int64_t rotary_dim, bool interleaved) {
    const RopeArgs args{static_cast<DType>(dtype),
                        at<char>(q),
                        at<char>(k),
                        q_token_stride,
                        q_head_stride,
                        k_token_stride,
                        k_head_stride,
                        q_heads,
                        k_heads,
                        at<const int64_t>(positions),
                        at<const float>(cos_sin),
                        max_position,
                        rotary_dim,
                        interleaved};
    const Unlocked unlocked(tokens * (q_heads + k_heads) * rotary_dim);
    run_rope(level_kernels(level), args, tokens);
}

void activation(int level, int dtype, int kind, Pointer gate_up, int64_t row_stride, int64_t rows, int64_t size,
                Pointer out) {
    const ActivationArgs args{static_cast<DType>(dtype),
                              static_cast<Activation>(kind),
                              at<const char>(gate_up),
                              row_stride,
                              at<char>(out),
                              size};
    const Unlocked unlocked(rows * size);
    run_activation(level_kernels(level), args, rows);
}

// k_strides and the others: (token or slot, head).
using Strides = std::pair<int64_t, int64_t>;

void store(int level, int dtype, bool int8_kv, Pointer k, Strides k_strides, Pointer v, Strides v_strides,
           Pointer k_cache, Strides k_cache_strides, Pointer v_cache, Strides v_cache_strides, int64_t tokens,
           int64_t heads, int64_t k_dim, int64_t v_dim, int64_t num_slots, Pointer out_loc) {
    const StoreArgs args{static_cast<DType>(dtype),
                         at<const char>(k),
                         at<const char>(v),
                         at<char>(k_cache),
                         at<char>(v_cache),
                         k_strides.first,
                         k_strides.second,
                         v_strides.first,
                         v_strides.second,
                         k_cache_strides.first,
                         k_cache_strides.second,
                         v_cache_strides.first,
                         v_cache_strides.second,
                         heads,
                         k_dim,
                         v_dim,
                         num_slots,
                         at<const int64_t>(out_loc),
                         int8_kv};
    const Unlocked unlocked(tokens * heads * (k_dim + v_dim));
    run_store(level_kernels(level), args, tokens);
}

void attention(int level, int dtype, bool int8_kv, Pointer q, Strides q_strides, Pointer k, Strides k_strides,
               Pointer v, Strides v_strides, Pointer out, int64_t tokens, int64_t heads, int64_t kv_heads,
               int64_t head_dim, int64_t v_dim, int64_t num_slots, Pointer page_table, int64_t table_stride,
               int64_t table_width, Pointer cu_q_lens, Pointer kv_lens, int64_t rows, int64_t page_size, int64_t window,
               float scale, float softcap, Pointer sinks, Pointer tree_mask, int64_t tree_mask_size,
               std::optional<nb::object> plan) {
    const AttentionArgs args{static_cast<DType>(dtype),
                             at<const char>(q),
                             at<const char>(k),
                             at<const char>(v),
                             at<char>(out),
                             q_strides.first,
                             q_strides.second,
                             k_strides.first,
                             k_strides.second,
                             v_strides.first,
                             v_strides.second,
                             heads,
                             kv_heads,
                             head_dim,
                             v_dim,
                             num_slots,
                             at<const int32_t>(page_table),
                             table_stride,
                             table_width,
                             at<const int32_t>(cu_q_lens),
                             at<const int32_t>(kv_lens),
                             rows,
                             tokens,
                             page_size,
                             window,
                             scale,
                             softcap,
                             at<const float>(sinks),
                             at<const uint8_t>(tree_mask),
                             tree_mask_size,
                             int8_kv};
    AttentionPlan* const kept = plan ? nb::cast<AttentionPlan*>(*plan) : nullptr;
    const nb::gil_scoped_release unlocked;
    if (kept != nullptr) {
        run_attention(level_kernels(level), args, *kept);
    } else {
        run_attention(level_kernels(level), args);
    }
}

void sample(int level, Pointer logits, int64_t rows, int64_t vocab, Pointer temperature, Pointer top_k, Pointer top_p,
            Pointer min_p, Pointer seeds, Pointer positions, Pointer out) {
    const SampleArgs args{at<const float>(logits),
                          vocab,
                          at<const float>(temperature),
                          at<const int32_t>(top_k),
                          at<const float>(top_p),
                          at<const float>(min_p),
                          at<const int64_t>(seeds),
                          at<const int64_t>(positions),
                          at<int64_t>(out)};
    const Unlocked unlocked(rows * vocab);
    run_sample(level_kernels(level), args, rows);
}

void penalties(Pointer logits, int64_t rows, int64_t vocab, Pointer history, int64_t history_stride,
               int64_t history_len, Pointer prompt_lens, Pointer lens, Pointer repetition, Pointer frequency,
               Pointer presence) {
    const PenaltyArgs args{at<float>(logits),
                           vocab,
                           at<const int32_t>(history),
                           history_stride,
                           history_len,
                           at<const int32_t>(prompt_lens),
                           at<const int32_t>(lens),
                           at<const float>(repetition),
                           at<const float>(frequency),
                           at<const float>(presence)};
    const Unlocked unlocked(rows * history_len);
    run_penalties(args, rows);
}

void scan(int level, Pointer logits, int64_t rows, int64_t vocab, Pointer argmax, Pointer finite) {
    const ScanArgs args{at<const float>(logits), vocab, at<int64_t>(argmax), at<uint8_t>(finite)};
    const Unlocked unlocked(rows * vocab);
    run_scan(level_kernels(level), args, rows);
}

void mask(int level, Pointer logits, int64_t rows, int64_t vocab, Pointer bits, int64_t stride) {
    const MaskArgs args{at<float>(logits), vocab, at<const int32_t>(bits), stride};
    const Unlocked unlocked(rows * vocab);
    run_mask(level_kernels(level), args, rows);
}

void logprobs(int level, Pointer logits, int64_t rows, int64_t vocab, Pointer token_ids, Pointer out) {
    const LogprobArgs args{at<const float>(logits), vocab, at<const int64_t>(token_ids), at<float>(out)};
    const Unlocked unlocked(rows * vocab);
    run_logprobs(level_kernels(level), args, rows);
}

std::vector<std::pair<std::string, std::string>> levels() {
    std::vector<std::pair<std::string, std::string>> result;
    for (int level = 0; level < NUM_LEVELS; ++level) result.emplace_back(level_name(level), level_obstacle(level));
    return result;
}

// ---- linear maps: weights are handles to memory that the caller keeps ----

PackedWeight make_weight(int kind, int64_t n, int64_t k, int64_t group, int activation, int activation_bits,
                         Pointer panels, Pointer bias, Pointer scale, bool has_offsets) {
    return {static_cast<WeightKind>(kind),
            n,
            k,
            group,
            activation,
            activation_bits,
            at<const char>(panels),
            at<const float>(bias),
            at<const float>(scale),
            has_offsets};
}

PackedExperts make_experts(const std::vector<const PackedWeight*>& gate_up,
                           const std::vector<const PackedWeight*>& down) {
    PackedExperts experts;
    for (const PackedWeight* weight : gate_up) experts.gate_up.push_back(*weight);
    for (const PackedWeight* weight : down) experts.down.push_back(*weight);
    return experts;
}

void linear(int level, const PackedWeight& weight, int x_dtype, Pointer x, int64_t rows, int64_t x_stride,
            int out_dtype, Pointer out, int64_t out_stride, bool accumulate) {
    const LinearArgs args{&weight,
                          static_cast<DType>(x_dtype),
                          static_cast<DType>(out_dtype),
                          at<const char>(x),
                          rows,
                          x_stride,
                          at<char>(out),
                          out_stride,
                          accumulate};
    const Unlocked unlocked(rows * weight.n * weight.k / 16);
    run_linear(level_kernels(level), args);
}

void experts(int level, const PackedExperts& experts, int dtype, Pointer x, int64_t tokens, int64_t x_stride,
             Pointer ids, Pointer weights, int64_t top_k, Pointer out, int64_t out_stride) {
    const ExpertsArgs args{experts.gate_up.data(),
                           experts.down.data(),
                           static_cast<int64_t>(experts.gate_up.size()),
                           static_cast<DType>(dtype),
                           at<const char>(x),
                           tokens,
                           x_stride,
                           at<const int64_t>(ids),
                           at<const float>(weights),
                           top_k,
                           at<char>(out),
                           out_stride};
    const nb::gil_scoped_release unlocked;
    run_experts(level_kernels(level), args);
}

void pack(int kind, int dtype, Pointer source, int64_t row_stride, int64_t n, int64_t k, int activation,
          Pointer panels) {
    const nb::gil_scoped_release unlocked;
    pack_float(static_cast<WeightKind>(kind), {static_cast<DType>(dtype), at<const char>(source), row_stride}, n, k,
               activation, at<char>(panels));
}

int64_t bytes_of_panels(int kind, int64_t n, int64_t k, int activation) {
    return panel_bytes(static_cast<WeightKind>(kind), n, k, activation);
}

void pack_per_output(Pointer source, int64_t n, int activation, Pointer out) {
    pack_outputs(at<const float>(source), n, activation, at<float>(out));
}

// Operations of `rounds` rounds of register-resident products on each thread, for the arithmetic a weight kind takes.
int64_t burn(int level, int kind, int64_t rounds) {
    const Kernels& kernels = level_kernels(level);
    const nb::gil_scoped_release unlocked;
    std::atomic<int64_t> done{0};
    parallel_for(num_threads() * 16, [&](int64_t) {
        float sink;
        done += kernels.burn(static_cast<WeightKind>(kind), rounds, &sink);
    });
    return done;
}

void read_through(int level, Pointer data, int64_t bytes) {
    const Kernels& kernels = level_kernels(level);
    const nb::gil_scoped_release unlocked;
    const int64_t parts = num_threads() * 16, each = bytes / parts / 256 * 256;
    parallel_for(parts, [&](int64_t i) {
        float sink;
        kernels.read_through(at<const char>(data) + i * each, each, &sink);
    });
}

// ---- quantised weights: linear_int.hpp ----

IntSource int_source(int64_t n, int64_t k, int64_t group, int bits, int activation, Pointer values, Pointer scale,
                     Pointer offset) {
    return {n, k, group, bits, activation, at<const uint8_t>(values), at<const float>(scale), at<const float>(offset)};
}

// (kind, whether groups have offsets, bytes of the panels, padded outputs).
std::tuple<int, bool, int64_t, int64_t> plan_quantized(const IntSource& source) {
    const nb::gil_scoped_release unlocked;
    const PackedWeight plan = plan_int(source);
    const int64_t panels = num_panels(plan);
    return {static_cast<int>(plan.kind), plan.has_offsets, panels * int_shape(plan).panel_bytes, panels * PANEL};
}

void pack_quantized(const IntSource& source, Pointer panels, Pointer scale) {
    const nb::gil_scoped_release unlocked;
    pack_int(source, at<char>(panels), at<float>(scale));
}

// ---- float weights that are rounded while they are packed ----

std::tuple<int, bool, int64_t, int64_t> plan_of_rounded(int64_t n, int64_t k, int64_t group, int bits, int activation) {
    const PackedWeight plan = plan_rounded(n, k, group, bits, activation);
    const int64_t panels = num_panels(plan);
    return {static_cast<int>(plan.kind), plan.has_offsets, panels * int_shape(plan).panel_bytes, panels * PANEL};
}

// parts: (address, rows, row stride).
void pack_and_round(int level, int dtype, const std::vector<std::tuple<Pointer, int64_t, int64_t>>& parts, int64_t k,
                    int64_t group, int bits, int activation, Pointer panels, Pointer scale) {
    std::vector<RoundSource::Part> rows;
    int64_t n = 0;
    for (const auto& [address, count, stride] : parts) {
        rows.push_back({{static_cast<DType>(dtype), at<const char>(address), stride}, count});
        n += count;
    }
    const nb::gil_scoped_release unlocked;
    const RoundSource source{rows.data(), static_cast<int64_t>(rows.size()), n, k, group, bits, activation};
    pack_rounded(level_kernels(level), source, at<char>(panels), at<float>(scale));
}

// ---- packed weights on disk ----

uint64_t checksum_of(Pointer data, int64_t bytes, int64_t first_chunk) {
    const nb::gil_scoped_release unlocked;
    return checksum(at<const char>(data), bytes, first_chunk);
}

// ranges: (offset, bytes, sum).
bool verify(Pointer file, const std::vector<std::tuple<int64_t, int64_t, uint64_t>>& ranges) {
    std::vector<ChecksumRange> all;
    for (const auto& [offset, bytes, sum] : ranges) all.push_back({offset, bytes, sum});
    const nb::gil_scoped_release unlocked;
    return has_checksums(at<const char>(file), all.data(), static_cast<int64_t>(all.size()));
}

void define_linear(nb::module_& m) {
    nb::class_<PackedWeight>(m, "Weight").def(nb::new_(&make_weight));
    nb::class_<PackedExperts>(m, "Experts").def(nb::new_(&make_experts));
    m.def("linear", &linear);
    m.def("experts", &experts);
    m.def("pack", &pack);
    m.def("panel_bytes", &bytes_of_panels);
    m.def("pack_outputs", &pack_per_output);
    nb::class_<IntSource>(m, "QuantizedSource").def(nb::new_(&int_source));
    m.def("plan_quantized", &plan_quantized);
    m.def("pack_quantized", &pack_quantized);
    m.def("plan_rounded", &plan_of_rounded);
    m.def("pack_rounded", &pack_and_round);
    m.attr("panel_layout") = 1; // counts up with every change of a panel's bytes: packed files hold them
    m.attr("checksum_chunk") = CHECKSUM_CHUNK;
    m.def("checksum", &checksum_of);
    m.def("verify", &verify);
    m.def("huge_pages", [](Pointer data, int64_t bytes) { ask_for_huge_pages(at<char>(data), bytes); });
    m.def(
        "populate", [](Pointer data, int64_t bytes) { return populate(at<char>(data), bytes); },
        nb::call_guard<nb::gil_scoped_release>());
    m.def("burn", &burn);
    m.def("read_through", &read_through);
}

} // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false); // an engine that lives to the end of the process keeps its plan: no leak
    m.attr("interface") = 12;     // counts up with every change of a signature below; pando.kernels.cpu checks it
    m.def("levels", &levels, "(name, why it can not be used or '') of every level, lowest first");
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads);
    m.def("set_aside", &set_aside);
    m.def("norm", &norm);
    m.def("rope", &rope);
    m.def("activation", &activation);
    m.def("store", &store);
    m.def("attention", &attention);
    m.def("set_shared_prefix", &set_shared_prefix);
    nb::class_<AttentionPlan>(m, "AttentionPlan")
        .def(nb::init<bool>())
        .def("reset", &AttentionPlan::reset)
        .def_prop_ro("keys_read", &AttentionPlan::keys_read)
        .def_prop_ro("keys_seen", &AttentionPlan::keys_seen);
    m.def("sample", &sample);
    m.def("penalties", &penalties);
    m.def("scan", &scan);
    m.def("mask", &mask);
    m.def("logprobs", &logprobs);
    define_linear(m);
    define_program(m);
    define_step(m);
    define_recurrent(m);
}
