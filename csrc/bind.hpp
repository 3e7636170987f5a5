// What every file that binds functions needs: addresses come from Python as integers.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>

namespace pando {

using Pointer = uintptr_t;

template <class T>
T* at(Pointer address) {
    return reinterpret_cast<T*>(address);
}

// Gives the interpreter lock away while a call works, if it works long enough to be worth the hand-over: after a tiny
// call a busy neighbour thread could hold the lock for milliseconds.
class Unlocked {
  public:
    explicit Unlocked(int64_t elements) {
        if (elements >= 1 << 14) release_.emplace();
    }

  private:
    std::optional<nanobind::gil_scoped_release> release_;
};

} // namespace pando
