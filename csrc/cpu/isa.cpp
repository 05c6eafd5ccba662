// Which instruction sets this build has and this CPU runs; the kernel table of each.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>

#include "cpu/tables.h"
#include "error.h"

namespace gemmart::cpu {
namespace {

enum Feature { AVX2 = 1, FMA = 2, F16C = 4, AVX512 = 8, AVX512VNNI = 16, AMX = 32, AVXVNNI = 64 };

constexpr struct {
    Feature feature;
    const char* name;
} kFeatures[] = {{AVX2, "avx2"},
                 {FMA, "fma"},
                 {F16C, "f16c"},
                 {AVXVNNI, "avx_vnni"},
                 {AVX512, "avx512f, bw, dq, vl"},
                 {AVX512VNNI, "avx512vnni"},
                 {AMX, "amx-int8, amx-bf16, avx512_bf16, or leave to use them"}};

#if defined(__x86_64__) && defined(__linux__)
// Tiles are large, so that a process must ask for them; threads that it starts later may use them too.
bool may_use_amx() {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAvx512Bf16 = 1u << 5;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8))
        return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl: ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool may_use_amx() { return false; }
#endif

int cpu_features() {
    int found = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found |= AVX2;
    if (__builtin_cpu_supports("fma")) found |= FMA;
    if (__builtin_cpu_supports("f16c")) found |= F16C;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found |= AVX512;
    if (__builtin_cpu_supports("avx512vnni")) found |= AVX512VNNI;
    // GCC 12 does not know this one's name.
    constexpr unsigned kAvxVnni = 1u << 4;
    unsigned a, b, c, d;
    if ((found & AVX2) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni)) found |= AVXVNNI;
    if (may_use_amx()) found |= AMX;
#endif
    return found;
}

using Fill = void (*)(Kernels&);

void fill_scalar(Kernels& k) {
    fill_matmul_scalar(k);
    fill_vector_scalar(k);
    fill_attention_scalar(k);
    fill_peak_scalar(k);
}

#ifdef GEMMART_HAVE_avx2
void fill_avx2(Kernels& k) {
    fill_matmul_avx2(k);
    fill_vector_avx2(k);
    fill_attention_avx2(k);
    fill_peak_avx2(k);
}
#else
constexpr Fill fill_avx2 = nullptr;
#endif

#ifdef GEMMART_HAVE_avxvnni
void fill_avxvnni(Kernels& k) {
    fill_matmul_avxvnni(k);
    fill_peak_avxvnni(k);
}
#else
constexpr Fill fill_avxvnni = nullptr;
#endif

#ifdef GEMMART_HAVE_avx512vnni
void fill_avx512vnni(Kernels& k) {
    fill_matmul_avx512vnni(k);
    fill_vector_avx512vnni(k);
    fill_attention_avx512vnni(k);
    fill_peak_avx512vnni(k);
}
#else
constexpr Fill fill_avx512vnni = nullptr;
#endif

#ifdef GEMMART_HAVE_amx
void fill_amx(Kernels& k) { fill_matmul_amx(k); }
#else
constexpr Fill fill_amx = nullptr;
#endif

constexpr struct {
    const char* name;
    int needs;
    Fill fill;
} kIsas[] = {
#define ISA(name, flags, features) {#name, features, fill_##name},
#include "cpu/isas.def"
#undef ISA
};
constexpr int kCount = sizeof(kIsas) / sizeof(kIsas[0]);

struct Tables {
    Kernels tables[kCount];
    std::vector<IsaStatus> statuses;

    Tables() {
        const int have = cpu_features();
        Kernels kernels{};
        for (int i = 0; i < kCount; ++i) {
            IsaStatus status{kIsas[i].name, kIsas[i].fill != nullptr, false, ""};
            for (auto [feature, name] : kFeatures)
                if (kIsas[i].needs & feature & ~have)
                    status.why_not += (status.why_not.empty() ? "this CPU lacks " : ", ") + std::string(name);
            if (!status.built) status.why_not = "not in this build";
            status.usable = status.why_not.empty();
            if (status.usable) kIsas[i].fill(kernels);
            kernels.isa = kIsas[i].name;
            tables[i] = kernels;
            statuses.push_back(status);
        }
    }
};

const Tables& tables() {
    static const Tables all;
    return all;
}

}  // namespace

std::vector<IsaStatus> isas() { return tables().statuses; }

const Kernels& kernels_for(const std::string& isa) {
    const Tables& all = tables();
    const char* forced = std::getenv("GEMMART_ISA");
    const std::string wanted = !isa.empty() ? isa : forced ? forced : "";
    std::string names;
    for (int i = kCount - 1; i >= 0; --i) {
        const IsaStatus& status = all.statuses[i];
        if (wanted.empty() && status.usable) return all.tables[i];
        if (wanted == status.name) {
            check<DeviceError>(status.usable, "GEMMART_ISA=", wanted, " cannot be used: ", status.why_not);
            return all.tables[i];
        }
        names = std::string(status.name) + (names.empty() ? "" : ", ") + names;
    }
    throw DeviceError(message("GEMMART_ISA=", wanted, " is unknown; this build knows ", names));
}

}  // namespace gemmart::cpu
