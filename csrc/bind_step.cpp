// The Python face of what happens around the model in a step. Tables come as (address, rows, width, row stride).
#include "bind.hpp"
#include "bind_step.hpp"
#include "isa.hpp"
#include "step.hpp"

#include <nanobind/stl/tuple.h>

#include <tuple>

namespace nb = nanobind;

namespace pando {

namespace {

using Table = std::tuple<Pointer, int64_t, int64_t, int64_t>;

TableView view(const Table& table) {
    const auto& [data, rows, width, stride] = table;
    return {at<int32_t>(data), rows, width, stride};
}

// writes: [3, count], slots, then indices, then ids.
void bound_write_pages(const Table& pages, Pointer writes, int64_t count) {
    const int64_t* columns = at<const int64_t>(writes);
    write_pages({view(pages), columns, columns + count, columns + 2 * count, count});
}

// columns: [4, rows], slots, starts, lengths, emit flags.
void bound_fill_step(Pointer columns, int64_t rows, const Table& tokens, const Table& pages, int64_t page_size,
                     int64_t num_tokens, int64_t num_emitting, Pointer input_ids, Pointer positions, Pointer out_loc,
                     Pointer cu_q_lens, Pointer kv_lens, const Table& page_table, Pointer last, Pointer emit_slots,
                     Pointer emit_ends) {
    const int64_t* column = at<const int64_t>(columns);
    const Unlocked unlocked(num_tokens + rows * std::get<2>(page_table));
    fill_step({column, column + rows, column + 2 * rows, column + 3 * rows, rows, view(tokens), view(pages), page_size,
               num_tokens, num_emitting, at<int64_t>(input_ids), at<int64_t>(positions), at<int64_t>(out_loc),
               at<int32_t>(cu_q_lens), at<int32_t>(kv_lens), view(page_table), at<int64_t>(last),
               at<int64_t>(emit_slots), at<int64_t>(emit_ends)});
}

// out: [2, rows], tokens, then whether a row is finite. The parameters are null for a greedy step.
void bound_choose(int level, Pointer logits, int64_t rows, int64_t vocab, Pointer slots, Pointer positions,
                  Pointer temperature, Pointer top_k, Pointer top_p, Pointer min_p, Pointer seeds,
                  const Table& history, Pointer out) {
    const Unlocked unlocked(rows * vocab);
    choose(level_kernels(level),
           {at<const float>(logits), rows, vocab, at<const int64_t>(slots), at<const int64_t>(positions),
            {at<const float>(temperature), at<const int32_t>(top_k), at<const float>(top_p), at<const float>(min_p),
             at<const int64_t>(seeds)},
            view(history), at<int64_t>(out), at<int64_t>(out) + rows});
}

} // namespace

void define_step(nb::module_& m) {
    m.def("write_pages", &bound_write_pages);
    m.def("fill_step", &bound_fill_step);
    m.def("choose", &bound_choose);
}

} // namespace pando
