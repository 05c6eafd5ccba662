// Attention with AVX-512: attention_simd.h on the vectors of simd_avx512.h, which therefore comes first. Keys of Q8_0
// are multiplied in integers (VNNI): 64 products an instruction instead of 16, and nothing to unpack.
#include "cpu/simd_avx512.h"

#include "cpu/attention_simd.h"

namespace gemmart::cpu {
namespace {

// 32 components of a query, rounded to d · (254 · high + low) with d = max / (127 · 254). The error, at most d / 2, is
// 1/254 of the one that keys get when they are stored.
struct ByteQuery {
    int8_t high[32], low[32];
    int32_t high_start, low_start;  // −128 Σ high, −128 Σ low: keys are multiplied as unsigned numbers, 128 larger
    float d;

    void set(const float* x) {
        *this = {};
        const float max = largest_bits_of(max_bits(magnitude(load(x)), magnitude(load(x + kLanes))));
        d = max / (127 * 254);
        // Too small to divide by, or a fault, which d brings to the scores.
        if (!(d >= 0x1p-126f && d < 0x1p100f)) return;
        for (int i = 0; i < 32; i += kLanes) {
            const Vec whole = round_to_integer(load(x + i) * splat(127 * 254 / max));
            const Vec above = round_to_integer(whole * splat(1.f / 254)), rest = fma(above, splat(-254), whole);
            store_int8(high + i, above);
            store_int8(low + i, rest);
            high_start -= 128 * _mm512_reduce_add_epi32(_mm512_cvtps_epi32(above));
            low_start -= 128 * _mm512_reduce_add_epi32(_mm512_cvtps_epi32(rest));
        }
    }
};
static_assert(sizeof(ByteQuery) * kMaxAttentionRows * (kMaxHeadDim / 32) <= spare_bytes(kMaxHeadDim));

// Four bytes from q on, in each lane.
__m512i four_bytes(const int8_t* q) {
    int32_t four;
    std::memcpy(&four, q, 4);
    return _mm512_set1_epi32(four);
}

// scores[r · kLdScores + slot] of the slots of a page. Products of 32 components are exact, then
// sum = sum + (254 · high + low) · key scale · d, in order.
template <int kRows>
void multiply_bytes(const ByteQuery* queries, int n_blocks, const std::byte* keys, const float* scales,
                    const std::byte* next, float* scores) {
    Vec sum[kRows][2];
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = splat(0);
    for (int b = 0; b < n_blocks; ++b) {
        __m512i high[kRows][2], low[kRows][2];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const ByteQuery& query = queries[r * n_blocks + b];
            high[r][0] = high[r][1] = _mm512_set1_epi32(query.high_start);
            low[r][0] = low[r][1] = _mm512_set1_epi32(query.low_start);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 32; i += 4) {
            const std::byte* at = keys + (b * 32 + i) * kPageTokens;
            const __m512i add_128 = _mm512_set1_epi8(-128);
            const __m512i keys0 = _mm512_xor_si512(_mm512_loadu_si512(at), add_128);
            const __m512i keys1 = _mm512_xor_si512(_mm512_loadu_si512(at + 64), add_128);
            prefetch_row<KvType::Q8_0>(next, b * 32 + i), prefetch_row<KvType::Q8_0>(next, b * 32 + i + 2);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const ByteQuery& query = queries[r * n_blocks + b];
                const __m512i query_high = four_bytes(query.high + i), query_low = four_bytes(query.low + i);
                high[r][0] = _mm512_dpbusd_epi32(high[r][0], keys0, query_high);
                high[r][1] = _mm512_dpbusd_epi32(high[r][1], keys1, query_high);
                low[r][0] = _mm512_dpbusd_epi32(low[r][0], keys0, query_low);
                low[r][1] = _mm512_dpbusd_epi32(low[r][1], keys1, query_low);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const Vec product =
                    fma(_mm512_cvtepi32_ps(high[r][half]), splat(254), _mm512_cvtepi32_ps(low[r][half]));
                const Vec scale = load(scales + b * kPageTokens + half * kLanes);
                sum[r][half] = fma(product * scale, splat(queries[r * n_blocks + b].d), sum[r][half]);
            }
    }
    for (int r = 0; r < kRows; ++r)
        for (int half = 0; half < 2; ++half) store(scores + r * kLdScores + half * kLanes, sum[r][half]);
}

// Scores of Q8_0 keys by products in integers.
template <KvType type>
struct ByteProducts : FloatProducts<type> {};

template <>
struct ByteProducts<KvType::Q8_0> : FloatProducts<KvType::Q8_0> {
    static void prepare(const AttentionJob& job, Rows& rows) {
        auto* to = reinterpret_cast<ByteQuery*>(rows.spare);
        for (int r = 0; r < rows.n; ++r)
            for (int i = 0; i < job.head_dim; i += 32) (to++)->set(rows.queries[r] + i);
    }

    template <bool>
    static void scores(const AttentionJob& job, const Rows& rows, uint32_t pages, const std::byte* const* parts) {
        const auto* queries = reinterpret_cast<const ByteQuery*>(rows.spare);
        const int n_blocks = job.head_dim / 32;
        for (int i = 0; i < kRangePages; ++i) {
            if (!(pages >> i & 1)) continue;
            const std::byte* next =
                pages >> (i + 1) & 1 ? parts[i + 1] + job.layout.keys : parts[__builtin_ctz(pages)] + job.layout.values;
            each_tile<4>(rows.n, [&]<int kRows>(int row, Count<kRows>) {
                if (rows.pages_of(row, kRows) >> i & 1)
                    multiply_bytes<kRows>(queries + row * n_blocks, n_blocks, parts[i] + job.layout.keys,
                                          reinterpret_cast<const float*>(parts[i] + job.layout.key_scales), next,
                                          rows.scores + row * kLdScores + i * kPageTokens);
            });
        }
    }
};

}  // namespace

void fill_attention_avx512vnni(Kernels& k) { fill_attention<ByteProducts>(k); }

}  // namespace gemmart::cpu
