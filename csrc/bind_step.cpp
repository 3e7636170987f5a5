// The Python face of what happens around the model in a step. Tables come as (address, rows, width, row stride).
#include "bind_step.hpp"
#include "bind.hpp"
#include "isa.hpp"
#include "step.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace pando {

namespace {

using Table = std::tuple<Pointer, int64_t, int64_t, int64_t>;
using Column = std::vector<int64_t>;

TableView view(const Table& table) {
    const auto& [data, rows, width, stride] = table;
    return {at<int32_t>(data), rows, width, stride};
}

// A request table, and the memory that the steps of one shape are flattened to.
class BoundTable {
  public:
    // pages: a table for each group of layers, all of one size.
    BoundTable(int level, const Table& tokens, const std::vector<Table>& pages, int64_t page_size, Pointer temperature,
               Pointer top_k, Pointer top_p, Pointer min_p, Pointer seed)
        : kernels_(level_kernels(level)),
          sampling_{at<const float>(temperature), at<const int32_t>(top_k), at<const float>(top_p),
                    at<const float>(min_p), at<const int64_t>(seed)} {
        step_.tokens = view(tokens);
        check(!pages.empty());
        for (const Table& table : pages) groups_.push_back({view(table), nullptr, {}});
        for (const PageGroup& group : groups_) {
            check(group.pages.rows == groups_[0].pages.rows && group.pages.width == groups_[0].pages.width);
        }
        step_.groups = groups_.data();
        step_.num_groups = static_cast<int64_t>(groups_.size());
        step_.page_size = page_size;
    }

    // groups: empty where all are of the first.
    void write_pages(const Column& slots, const Column& indices, const Column& ids, const Column& groups) {
        check(slots.size() == indices.size() && slots.size() == ids.size());
        check(groups.empty() || groups.size() == ids.size());
        pando::write_pages({step_.groups, step_.num_groups, groups.empty() ? nullptr : groups.data(), slots.data(),
                            indices.data(), ids.data(), static_cast<int64_t>(ids.size())});
    }

    // groups: of each, its out_loc and page_table.
    void bind(int64_t num_tokens, int64_t num_emitting, Pointer input_ids, Pointer positions,
              const std::vector<std::pair<Pointer, Table>>& groups, Pointer cu_q_lens, Pointer kv_lens, Pointer last,
              Pointer emit_slots, Pointer emit_ends) {
        check(groups.size() == groups_.size());
        for (size_t i = 0; i < groups.size(); ++i) {
            groups_[i].out_loc = at<int64_t>(groups[i].first);
            groups_[i].page_table = view(groups[i].second);
        }
        step_.num_tokens = num_tokens;
        step_.num_emitting = num_emitting;
        step_.input_ids = at<int64_t>(input_ids);
        step_.positions = at<int64_t>(positions);
        step_.cu_q_lens = at<int32_t>(cu_q_lens);
        step_.kv_lens = at<int32_t>(kv_lens);
        step_.last = at<int64_t>(last);
        step_.emit_slots = at<int64_t>(emit_slots);
        step_.emit_ends = at<int64_t>(emit_ends);
    }

    void flatten(const Column& slots, const Column& starts, const Column& lens, const Column& emits) {
        const size_t rows = slots.size();
        check(rows == starts.size() && rows == lens.size() && rows == emits.size());
        step_.slots = slots.data();
        step_.starts = starts.data();
        step_.lens = lens.data();
        step_.emits = emits.data();
        step_.rows = static_cast<int64_t>(rows);
        for (const PageGroup& group : groups_) {
            check(step_.rows == group.page_table.rows && group.page_table.width <= group.pages.width);
        }
        const Unlocked unlocked(step_.num_groups * (step_.num_tokens + step_.rows * groups_[0].page_table.width));
        pando::flatten(step_);
    }

    void write_tokens(const Column& slots, const Column& positions, const Column& ids) {
        check(slots.size() == positions.size() && slots.size() == ids.size());
        const int64_t count = static_cast<int64_t>(ids.size());
        pando::write_tokens({step_.tokens, slots.data(), positions.data(), ids.data(), count});
    }

    // out: [2, rows], tokens, then whether a row is finite. mask: words, `stride` for each of the rows `masked`.
    void choose(Pointer logits, int64_t rows, int64_t vocab, Pointer slots, Pointer ends, bool greedy, Pointer out,
                Pointer mask, int64_t stride, const Column& masked) {
        const Unlocked unlocked(rows * vocab);
        pando::choose(kernels_,
                      {at<const float>(logits),
                       rows,
                       vocab,
                       at<const int64_t>(slots),
                       at<const int64_t>(ends),
                       sampling_,
                       greedy,
                       step_.tokens,
                       at<int64_t>(out),
                       at<int64_t>(out) + rows,
                       {at<const int32_t>(mask), stride, masked.data(), static_cast<int64_t>(masked.size())}});
    }

  private:
    static void check(bool fits) {
        if (!fits) throw std::invalid_argument("columns or tables do not fit together");
    }

    const Kernels& kernels_;
    const SamplingColumns sampling_;
    std::vector<PageGroup> groups_;
    FlattenArgs step_{};
};

} // namespace

void define_step(nb::module_& m) {
    nb::class_<BoundTable>(m, "StepTable")
        .def(nb::init<int, const Table&, const std::vector<Table>&, int64_t, Pointer, Pointer, Pointer, Pointer,
                      Pointer>())
        .def("write_pages", &BoundTable::write_pages)
        .def("write_tokens", &BoundTable::write_tokens)
        .def("bind", &BoundTable::bind)
        .def("flatten", &BoundTable::flatten)
        .def("choose", &BoundTable::choose);
}

} // namespace pando
