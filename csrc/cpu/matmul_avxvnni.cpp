// Matrix products with AVX-VNNI: the vectors of AVX2, but one instruction multiplies four bytes and adds them in 32
// bits.
#include "cpu/matmul_avx2.h"

namespace gemmart::cpu {
namespace {

struct AvxVnni : Avx2 {
    static constexpr int kSignedBias = 128;
    static GEMMART_INLINE B signed_bytes(B x) { return _mm256_xor_si256(x, set_bytes(-128)); }

    template <int kBits>
    struct Dot {
        B total;
        template <int kBias>
        GEMMART_INLINE void begin(const int32_t* sum) {
            static_assert((kBias & (kBias - 1)) == 0);
            total =
                kBias ? _mm256_slli_epi32(_mm256_set1_epi32(*sum), __builtin_ctz(kBias | 256)) : _mm256_setzero_si256();
        }
        template <int>
        GEMMART_INLINE void add(B u, const int8_t* q) {
            int four;
            __builtin_memcpy(&four, q, 4);
            total = _mm256_dpbusd_avx_epi32(total, u, _mm256_set1_epi32(four));
        }
        GEMMART_INLINE void add(const Dot& other) { total = _mm256_add_epi32(total, other.total); }
        GEMMART_INLINE void add_256_times(const Dot& other) {
            total = _mm256_add_epi32(_mm256_slli_epi32(other.total, 8), total);
        }
        GEMMART_INLINE F sum() const { return _mm256_cvtepi32_ps(total); }
    };
};

}  // namespace

void fill_matmul_avxvnni(Kernels& k) { k.matmul = matmul_x86<AvxVnni, ManyColumns>; }

}  // namespace gemmart::cpu
