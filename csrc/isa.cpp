#include "isa.hpp"

#include <array>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pando {

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports checks that the system saves the registers, too; it does not know F16C in older compilers.
bool has_f16c() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
}

const char* missing_feature(int level) {
    __builtin_cpu_init();
    if (level >= 1) {
        if (!__builtin_cpu_supports("avx2")) return "this processor has no AVX2";
        if (!__builtin_cpu_supports("fma")) return "this processor has no FMA";
        if (!has_f16c()) return "this processor has no F16C";
    }
    if (level >= 2) {
        if (!__builtin_cpu_supports("avx512f")) return "this processor has no AVX-512F";
        if (!__builtin_cpu_supports("avx512bw")) return "this processor has no AVX-512BW";
        if (!__builtin_cpu_supports("avx512vl")) return "this processor has no AVX-512VL";
        if (!__builtin_cpu_supports("avx512dq")) return "this processor has no AVX-512DQ";
    }
#if defined(PANDO_HAVE_avx512_bf16)
    if (level >= 3) {
        if (!__builtin_cpu_supports("avx512bf16")) return "this processor has no AVX-512-BF16";
        if (!__builtin_cpu_supports("avx512vnni")) return "this processor has no AVX-512-VNNI";
    }
#endif
    return "";
}
#else
const char* missing_feature(int) { return ""; }
#endif

const Kernels* compiled(int level) {
    switch (level) {
    case 0: return &portable::kernels;
#if defined(PANDO_HAVE_avx2)
    case 1: return &avx2::kernels;
#endif
#if defined(PANDO_HAVE_avx512)
    case 2: return &avx512::kernels;
#endif
#if defined(PANDO_HAVE_avx512_bf16)
    case 3: return &avx512_bf16::kernels;
#endif
    default: return nullptr;
    }
}

const char* const NAMES[NUM_LEVELS] = {"portable", "avx2", "avx512", "avx512_bf16"};

} // namespace

const char* level_name(int level) { return NAMES[level]; }

const char* level_obstacle(int level) {
    // Asked once: in a virtual machine CPUID costs many microseconds.
    static const std::array<const char*, NUM_LEVELS> obstacles = [] {
        std::array<const char*, NUM_LEVELS> found{};
        for (int i = 0; i < NUM_LEVELS; ++i) {
            found[i] = compiled(i) ? missing_feature(i)
                                   : "not compiled: for another processor family, or the compiler is too old";
        }
        return found;
    }();
    return obstacles[level];
}

const Kernels& level_kernels(int level) {
    if (level < 0 || level >= NUM_LEVELS) throw std::invalid_argument("no such level");
    const char* obstacle = level_obstacle(level);
    if (*obstacle) throw std::invalid_argument(std::string(NAMES[level]) + ": " + obstacle);
    return *compiled(level);
}

} // namespace pando
