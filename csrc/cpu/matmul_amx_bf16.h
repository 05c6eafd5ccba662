// Products of BF16 weights in tiles, for any number of columns. A number x of the activations is the sum of three
// bfloat16 terms, each what the ones before it leave, 24 bits together as float32 has; the products of each are exact
// in float32. A group of 32 columns of a panel is a right-hand tile as it stands. Each sum is one chain in order of the
// column: a group's low terms, then its middle and its high ones. A row of a tile depends on no other row, so the bits
// are the same with any number of columns. tdpbf16ps rounds to nearest even and takes subnormal numbers for zero,
// whatever MXCSR says.
#pragma once

#include "cpu/matmul_avx512.h"

namespace gemmart::cpu {
namespace {

constexpr int kTileTokens = 16, kTerms = 3;
constexpr int kTermChunk = 256;                           // tokens whose terms stand in scratch
constexpr size_t kTermBytes = kScratchBytes / 2;          // of those; the other half takes packed panels
constexpr int kTermRun = 4096;                            // columns at a time, at most
constexpr int kTermPanels = 32;                           // panels of a run that stay in L2 while the tokens pass
constexpr int kPackedPanels = 4;                          // those packed at a time where the weights stand in rows
constexpr size_t kPairBytes = kPanel * sizeof(uint32_t);  // two columns of a panel; a row of 32 terms has as many
static_assert(kPackedPanels * kTermRun / 2 * kPairBytes <= kScratchBytes - kTermBytes);

// Tiles 0-3 take sums [n_tokens][16 rows], 4 to 6 the terms [n_tokens][32 columns], low ones first, 7 weights
// [16 pairs of columns][16 rows][2]. They belong to this thread while the object lives.
struct TermTiles {
    explicit TermTiles(int n_tokens) {
        const auto n = static_cast<uint8_t>(n_tokens);
        const struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t n_rows[16];
        } config{.n_rows = {n, n, n, n, n, n, n, 16}};
        _tile_loadconfig(&config);
    }
    ~TermTiles() { _tile_release(); }
};

// In assembler: GCC's intrinsics take no constant of a template, and that of a load does not say that it reads memory.
template <int kTile>
GEMMART_INLINE void load_tile(const void* from, size_t stride) {
    __asm__ volatile("tileloadd (%[from],%[stride],1), %%tmm%c[tile]"
                     :
                     : [from] "r"(from), [stride] "r"(stride), [tile] "i"(kTile)
                     : "memory");
}

template <int kTile>
GEMMART_INLINE void store_tile(void* to, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c[tile], (%[to],%[stride],1)"
                     :
                     : [to] "r"(to), [stride] "r"(stride), [tile] "i"(kTile)
                     : "memory");
}

template <int kSum, int kLeft, int kRight>
GEMMART_INLINE void multiply_tiles() {
    __asm__ volatile("tdpbf16ps %%tmm%c[right], %%tmm%c[left], %%tmm%c[sum]"
                     :
                     : [sum] "i"(kSum), [left] "i"(kLeft), [right] "i"(kRight));
}

GEMMART_INLINE void transpose(__m512 (&v)[16]) {
    __m512 t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const auto pairs = [&](int j) __attribute__((always_inline)) { return _mm512_castps_pd(t[i + j]); };
        v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(0), pairs(2)));
        v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(0), pairs(2)));
        v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(1), pairs(3)));
        v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(1), pairs(3)));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512 low0 = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x44);
        const __m512 low1 = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x44);
        const __m512 high0 = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xee);
        const __m512 high1 = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xee);
        v[j] = _mm512_shuffle_f32x4(low0, low1, 0x88);
        v[4 + j] = _mm512_shuffle_f32x4(low0, low1, 0xdd);
        v[8 + j] = _mm512_shuffle_f32x4(high0, high1, 0x88);
        v[12 + j] = _mm512_shuffle_f32x4(high0, high1, 0xdd);
    }
}

// terms [n_cols / 32][low, middle, high][n_tokens][32] <- a column group x [n_cols][width] as tokens `token` and
// following.
inline void split(const float* x, int width, int n_cols, uint16_t* terms, int n_tokens, int token) {
    const auto store = [](uint16_t* to, __m256bh term) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)term);
    };
    for (int k = 0; k < n_cols; k += 16) {
        __m512 v[16];
        if (width == 1) {
            v[0] = Avx512::load(x + k);
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) v[i] = Avx512::load_some(x + (k + i) * width, width);
            transpose(v);
        }
        uint16_t* low = terms + (k / kGroup * kTerms * n_tokens + token) * kGroup + k % kGroup;
        for (int c = 0; c < width; ++c) {
            __m512 rest = v[c];
            for (int term = kTerms - 1; term >= 0; --term) {
                const __m256bh rounded = _mm512_cvtneps_pbh(rest);
                store(low + (term * n_tokens + c) * kGroup, rounded);
                const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)rounded), 16);
                rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(bits));
            }
        }
    }
}

// n_tokens' terms times P panels of `stride` bytes, of which the first to.n_rows rows exist.
template <int P>
void multiply_terms(const uint16_t* terms, int n_tokens, Bytes panels, size_t stride, int n_cols, const Target& to,
                    bool first_time) {
    constexpr int kAhead = 3072;
    alignas(64) float last[kTileTokens * kPanel];  // a last panel that is not whole
    float* const end = to.out + (P - 1) * kPanel;
    const int n_last = to.n_rows - (P - 1) * kPanel;
    const auto sums = [&](int p) { return p == P - 1 && n_last < kPanel ? last : to.out + p * kPanel; };
    const auto sum_stride = [&](int p) { return (p == P - 1 && n_last < kPanel ? kPanel : to.ld) * sizeof(float); };
    if (to.go_on && n_last < kPanel)
        for (int c = 0; c < n_tokens; ++c) Avx512::store(last + c * kPanel, Avx512::load_some(end + c * to.ld, n_last));
    unroll<P>([&](auto p) __attribute__((always_inline)) {
        if (to.go_on)
            load_tile<p.value>(sums(p.value), sum_stride(p.value));
        else
            __asm__ volatile("tilezero %%tmm%c[tile]" : : [tile] "i"(p.value));
    });
    const size_t term_elements = static_cast<size_t>(n_tokens) * kGroup;
    for (int k = 0; k < n_cols; k += kGroup, terms += kTerms * term_elements, panels += kGroup / 2 * kPairBytes) {
        load_tile<4>(terms, kPairBytes);
        load_tile<5>(terms + term_elements, kPairBytes);
        load_tile<6>(terms + 2 * term_elements, kPairBytes);
        unroll<P>([&](auto p) __attribute__((always_inline)) {
            constexpr int kPanelTile = p.value, kRight = 7;
            const Bytes weights = panels + kPanelTile * stride;
            if (first_time)
                for (int i = 0; i < kGroup / 2; ++i) _mm_prefetch(weights + kAhead + i * kPairBytes, _MM_HINT_T1);
            load_tile<kRight>(weights, kPairBytes);
            multiply_tiles<kPanelTile, 4, kRight>();
            multiply_tiles<kPanelTile, 5, kRight>();
            multiply_tiles<kPanelTile, 6, kRight>();
        });
    }
    unroll<P>([&](auto p) __attribute__((always_inline)) { store_tile<p.value>(sums(p.value), sum_stride(p.value)); });
    if (n_last < kPanel)
        for (int c = 0; c < n_tokens; ++c) Avx512::store_some(end + c * to.ld, Avx512::load(last + c * kPanel), n_last);
}

inline void matmul_bf16(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out,
                        size_t ld_out, std::byte* scratch) {
    auto* terms = reinterpret_cast<uint16_t*>(scratch);
    std::byte* packed = scratch + kTermBytes;
    const int chunk = least(x.n_tokens, kTermChunk);
    const int run =
        least(kTermRun, static_cast<int>(kTermBytes / (kTerms * sizeof(uint16_t))) / chunk / kGroup * kGroup);
    const int block = w.packed ? kTermPanels : kPackedPanels;
    for (int from = 0; from < x.n_tokens; from += chunk) {
        const int n_tokens = least(chunk, x.n_tokens - from);
        for (int k = 0; k < w.n_cols; k += run) {
            const int n_cols = least(run, w.n_cols - k);
            const auto terms_of = [&](int token) { return terms + static_cast<size_t>(token) * kTerms * n_cols; };
            for (int token = 0, width; token < n_tokens; token += width) {
                width = column_group_width(n_tokens - token);
                const int tile = token / kTileTokens * kTileTokens;
                split(x.data.x + static_cast<size_t>(from + token) * x.n_cols + static_cast<size_t>(k) * width, width,
                      n_cols, terms_of(tile), least(kTileTokens, n_tokens - tile), token - tile);
            }
            for (int panel = panel_begin; panel < panel_end; panel += block) {
                const int n_panels = least(block, panel_end - panel);
                const std::byte* panels = w.data + panel * w.stride + k / 2 * kPairBytes;
                size_t stride = w.stride;
                if (!w.packed) {
                    stride = n_cols / 2 * kPairBytes;
                    panels = packed;
                    for (int i = 0; i < n_panels; ++i) {
                        const int row = (panel + i) * kPanel;
                        pack_panel(w.dtype, w.data + row * w.stride + k * sizeof(uint16_t), w.stride,
                                   least(kPanel, w.n_rows - row), n_cols, packed + i * stride);
                    }
                }
                for (int token = 0; token < n_tokens; token += kTileTokens) {
                    const int n = least(kTileTokens, n_tokens - token);
                    const TermTiles tiles(n);
                    for (int i = 0; i < n_panels; i += 4) {
                        const int row = (panel + i) * kPanel, n_left = n_panels - i;
                        auto* multiply = n_left >= 4   ? multiply_terms<4>
                                         : n_left == 3 ? multiply_terms<3>
                                         : n_left == 2 ? multiply_terms<2>
                                                       : multiply_terms<1>;
                        multiply(terms_of(token), n, reinterpret_cast<Bytes>(panels) + i * stride, stride, n_cols,
                                 {out + (from + token) * ld_out + row, ld_out, w.n_rows - row, k > 0},
                                 from + token == 0);
                    }
                }
            }
        }
    }
}

}  // namespace
}  // namespace gemmart::cpu
