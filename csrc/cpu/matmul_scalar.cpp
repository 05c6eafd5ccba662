// Matrix products in plain C++: the truth that every other ISA is compared with. One block of a panel is unpacked at a
// time to bytes, scales and offsets, then multiplied with each column; layout.h and kernels.h state layout and order of
// sums.
#include <cstring>

#include "cpu/tables.h"
#include "formats/iq4_nl.h"

namespace gemmart::cpu {
namespace {

// A block of a panel of an integer format: weight = scale · (u − bias) − offset.
struct Unpacked {
    uint8_t u[kBlock * kPanel];        // [slot][row][4 columns]
    float scale[kBlock / 16][kPanel];  // a group of 32, or a half group of 16 columns
    float offset[kBlock / 16][kPanel];  // of the formats that have one
};

using Bytes = const uint8_t*;

uint8_t nibble(Bytes p, int which) { return which ? *p >> 4 : *p & 15; }
float half_at(Bytes p, int i) {
    uint16_t bits;
    std::memcpy(&bits, p + 2 * i, 2);
    return half_to_float(bits);
}
uint8_t bit_at(Bytes p, int i) { return (p[i / 8] >> (i % 8)) & 1; }

void unpack_q4_0(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = nibble(p + 32 + i % 256, i / 256);
    for (int r = 0; r < kPanel; ++r) out.scale[0][r] = half_at(p, r);
}

void unpack_q4_1(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = nibble(p + 64 + i % 256, i / 256);
    for (int r = 0; r < kPanel; ++r) {
        out.scale[0][r] = half_at(p, r);
        out.offset[0][r] = -half_at(p + 32, r);
    }
}

void unpack_q5_0(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = nibble(p + 96 + i % 256, i / 256) | bit_at(p + 32, i) << 4;
    for (int r = 0; r < kPanel; ++r) out.scale[0][r] = half_at(p, r);
}

void unpack_q5_1(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = nibble(p + 128 + i % 256, i / 256) | bit_at(p + 64, i) << 4;
    for (int r = 0; r < kPanel; ++r) {
        out.scale[0][r] = half_at(p, r);
        out.offset[0][r] = -half_at(p + 32, r);
    }
}

void unpack_q8_0(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = p[32 + i] ^ 0x80;
    for (int r = 0; r < kPanel; ++r) out.scale[0][r] = half_at(p, r);
}

void unpack_iq4_nl(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = kIQ4Levels[nibble(p + 32 + i % 256, i / 256)] + 128;
    for (int r = 0; r < kPanel; ++r) out.scale[0][r] = half_at(p, r);
}

// The six bits of group g, row r
int six_bits(Bytes lo, Bytes hi, int g, int r) {
    return nibble(lo + g / 2 * kPanel + r, g & 1) | ((hi[g / 4 * kPanel + r] >> 2 * (g % 4)) & 3) << 4;
}

int two_bits(Bytes p, int which) { return *p >> 2 * which & 3; }

void unpack_q2_k(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g)
        for (int i = 0; i < 512; ++i) out.u[512 * g + i] = two_bits(p + 320 + g / 4 * 512 + i, g % 4);
    for (int s = 0; s < 16; ++s)
        for (int r = 0; r < kPanel; ++r) {
            out.scale[s][r] = half_at(p, r) * nibble(p + 64 + s * kPanel + r, 0);
            out.offset[s][r] = half_at(p + 32, r) * nibble(p + 64 + s * kPanel + r, 1);
        }
}

void unpack_q3_k(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g)
        for (int i = 0; i < 512; ++i)
            out.u[512 * g + i] = two_bits(p + 736 + g / 4 * 512 + i, g % 4) | bit_at(p + 224 + 64 * g, i) << 2;
    for (int s = 0; s < 16; ++s)
        for (int r = 0; r < kPanel; ++r) {
            const int six = nibble(p + 32 + s % 8 * kPanel + r, s / 8) | two_bits(p + 160 + s % 4 * kPanel + r, s / 4)
                                                                             << 4;
            out.scale[s][r] = half_at(p, r) * (six - 32);
        }
}

void unpack_k_scales(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g)
        for (int r = 0; r < kPanel; ++r) {
            out.scale[g][r] = half_at(p, r) * six_bits(p + 64, p + 192, g, r);
            out.offset[g][r] = half_at(p + 32, r) * six_bits(p + 128, p + 224, g, r);
        }
}

void unpack_q4_k(Bytes p, Unpacked& out) {
    unpack_k_scales(p, out);
    for (int g = 0; g < 8; ++g)
        for (int i = 0; i < 512; ++i) out.u[512 * g + i] = nibble(p + 256 + g / 2 * 512 + i, g & 1);
}

void unpack_q5_k(Bytes p, Unpacked& out) {
    unpack_k_scales(p, out);
    for (int g = 0; g < 8; ++g)
        for (int i = 0; i < 512; ++i)
            out.u[512 * g + i] = nibble(p + 768 + g / 2 * 512 + i, g & 1) | bit_at(p + 256 + 64 * g, i) << 4;
}

void unpack_q6_k(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g) {
        const int h = g / 4, j = g % 4;
        for (int i = 0; i < 512; ++i)
            out.u[512 * g + i] =
                nibble(p + 288 + h * 1024 + (j & 1) * 512 + i, j >> 1) | ((p[2336 + h * 512 + i] >> 2 * j) & 3) << 4;
    }
    for (int s = 0; s < 16; ++s)
        for (int r = 0; r < kPanel; ++r) {
            out.scale[s][r] = half_at(p, r) * static_cast<int8_t>(p[32 + s * kPanel + r]);
        }
}

void unpack_iq4_xs(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g) {
        for (int i = 0; i < 512; ++i)
            out.u[512 * g + i] = kIQ4Levels[nibble(p + 128 + 256 * g + i % 256, i / 256)] + 128;
        for (int r = 0; r < kPanel; ++r) {
            out.scale[g][r] = half_at(p, r) * (six_bits(p + 32, p + 96, g, r) - 32);
        }
    }
}

// One column group of x, seen from column c of width w.
struct Column {
    const int8_t* q;
    const float *d, *ds32, *ds16, *x;
    int w;
};

Column column_of(const Activations& x, int group_begin, int w, int c) {
    const ActivationArrays at = arrays_at(x.data, static_cast<size_t>(group_begin) * x.n_cols);
    return {at.q + c * kGroup, at.d + c, at.ds32 + c, at.ds16 + c, at.x + c, w};
}

// How the numbers of a format's blocks are to be read.
struct Format {
    int columns;  // a block
    bool halves;  // a scale for 16 columns, otherwise for 32
    int bias;
    bool offset;
};

template <Format kFormat, void (*unpack)(Bytes, Unpacked&)>
void accumulate_integer(Bytes block, int first_group, const Column& x, float* sum, Unpacked& scratch, bool fresh) {
    if (fresh) unpack(block, scratch);
    for (int i = 0; i < kFormat.columns / kGroup; ++i) {
        const int g = first_group + i;
        const float d = x.d[g * x.w];
        for (int r = 0; r < kPanel; ++r) {
            int dot[2] = {0, 0};
            for (int k = 0; k < kGroup; ++k)
                dot[k / 16] +=
                    (scratch.u[(8 * i + k / 4) * 64 + 4 * r + k % 4] - kFormat.bias) * x.q[g * kGroup * x.w + k];
            if constexpr (kFormat.halves) {
                const float t = scratch.scale[2 * i][r] * dot[0] + scratch.scale[2 * i + 1][r] * dot[1];
                sum[r] += t * d;
                if constexpr (kFormat.offset) {
                    sum[r] -= scratch.offset[2 * i][r] * x.ds16[2 * g * x.w];
                    sum[r] -= scratch.offset[2 * i + 1][r] * x.ds16[(2 * g + 1) * x.w];
                }
            } else {
                sum[r] += scratch.scale[i][r] * (dot[0] + dot[1]) * d;
                if constexpr (kFormat.offset) sum[r] -= scratch.offset[i][r] * x.ds32[g * x.w];
            }
        }
    }
}

void store(const float* sum, int row, int n_rows, float* out) {
    for (int r = 0; r < kPanel && row + r < n_rows; ++r) out[row + r] = sum[r];
}

template <Format kFormat, void (*unpack)(Bytes, Unpacked&)>
void matmul_integer(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                    std::byte* scratch) {
    auto& unpacked = *reinterpret_cast<Unpacked*>(scratch);
    const int n_blocks = w.n_cols / kFormat.columns;
    const size_t block_bytes = w.stride / n_blocks;
    auto* sums = reinterpret_cast<float (*)[kPanel]>(scratch + sizeof(Unpacked));
    constexpr int kSums = (kScratchBytes - sizeof(Unpacked)) / sizeof(*sums) / kMaxWidth * kMaxWidth;
    for (int c0 = 0; c0 < x.n_tokens; c0 += kSums) {  // as many columns as there are sums
        const int c1 = x.n_tokens - c0 < kSums ? x.n_tokens : c0 + kSums;
        for (int panel = panel_begin; panel < panel_end; ++panel) {
            for (int c = c0; c < c1; ++c)
                for (int r = 0; r < kPanel; ++r) {
                    const int row = panel * kPanel + r;
                    sums[c - c0][r] = x.go_on && row < w.n_rows ? out[c * ld_out + row] : 0;
                }
            for (int block = 0; block < n_blocks; ++block) {
                const auto* p = reinterpret_cast<Bytes>(w.data + panel * w.stride + block * block_bytes);
                bool fresh = true;
                for (int begin = c0, width; begin < c1; begin += width) {
                    width = column_group_width(x.n_tokens - begin);
                    for (int c = 0; c < width; ++c, fresh = false)
                        accumulate_integer<kFormat, unpack>(p, block * kFormat.columns / kGroup,
                                                                      column_of(x, begin, width, c),
                                                                      sums[begin + c - c0], unpacked, fresh);
                }
            }
            for (int c = c0; c < c1; ++c) store(sums[c - c0], panel * kPanel, w.n_rows, out + c * ld_out);
        }
    }
}

// A panel of a float format as F32 [n_cols][16], kGroup columns from `k`.
void read_float_panel(const Matrix& w, int panel, int k, float (*out)[kPanel]) {
    const std::byte* p = w.data + panel * w.stride;
    for (int i = 0; i < kGroup; ++i)
        for (int r = 0; r < kPanel; ++r) {
            uint16_t bits;
            if (w.dtype == DType::F32) {
                std::memcpy(&out[i][r], p + ((k + i) * kPanel + r) * 4, 4);
            } else if (w.dtype == DType::F16) {
                std::memcpy(&bits, p + ((k + i) * kPanel + r) * 2, 2);
                out[i][r] = half_to_float(bits);
            } else {
                std::memcpy(&bits, p + ((k + i) / 2 * kPanel * 2 + r * 2 + i % 2) * 2, 2);
                out[i][r] = bfloat16_to_float(bits);
            }
        }
}

template <typename ReadGroup>
void multiply_float(int n_groups, const Activations& x, int row, int n_rows, float* out, size_t ld_out,
                    ReadGroup read_group) {
    float w[kGroup][kPanel];
    for (int g = 0; g < n_groups; ++g) {
        read_group(g, w);
        for (int begin = 0, width; begin < x.n_tokens; begin += width) {
            width = column_group_width(x.n_tokens - begin);
            for (int c = 0; c < width; ++c) {
                const Column column = column_of(x, begin, width, c);
                float* sum = out + (begin + c) * ld_out + row;
                for (int r = 0; r < kPanel && row + r < n_rows; ++r) {
                    float part = 0;
                    for (int i = 0; i < kGroup; ++i) part += w[i][r] * column.x[(g * kGroup + i) * width];
                    sum[r] = g || x.go_on ? sum[r] + part : part;
                }
            }
        }
    }
}

void matmul_float(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                  std::byte*) {
    for (int panel = panel_begin; panel < panel_end; ++panel)
        multiply_float(w.n_cols / kGroup, x, panel * kPanel, w.n_rows, out, ld_out,
                       [&](int g, float (*to)[kPanel]) { read_float_panel(w, panel, g * kGroup, to); });
}

// Formats without a packed layout: 256 columns of 16 rows are decoded at a time.
void matmul_rows(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                 std::byte* scratch) {
    const FormatInfo& format = format_of(w.dtype);
    auto* decoded = reinterpret_cast<float (*)[kBlock]>(scratch);
    for (int panel = panel_begin; panel < panel_end; ++panel)
        multiply_float(w.n_cols / kGroup, x, panel * kPanel, w.n_rows, out, ld_out, [&](int g, float (*to)[kPanel]) {
            const int k = g * kGroup, begin = k / kBlock * kBlock;
            const int n = w.n_cols - begin < kBlock ? w.n_cols - begin : kBlock;
            for (int r = 0; r < kPanel; ++r) {
                const int row = panel * kPanel + r;
                if (k == begin && row < w.n_rows)
                    format.decode(w.data + row * w.stride + row_bytes(format, begin), decoded[r], n);
                for (int i = 0; i < kGroup; ++i) to[i][r] = row < w.n_rows ? decoded[r][k - begin + i] : 0;
            }
        });
}

void matmul_scalar(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                   std::byte* scratch) {
    auto* multiply = !w.packed                  ? matmul_rows
                     : w.dtype == DType::Q4_0   ? matmul_integer<Format{32, false, 8, false}, unpack_q4_0>
                     : w.dtype == DType::Q4_1   ? matmul_integer<Format{32, false, 0, true}, unpack_q4_1>
                     : w.dtype == DType::Q5_0   ? matmul_integer<Format{32, false, 16, false}, unpack_q5_0>
                     : w.dtype == DType::Q5_1   ? matmul_integer<Format{32, false, 0, true}, unpack_q5_1>
                     : w.dtype == DType::Q2_K   ? matmul_integer<Format{256, true, 0, true}, unpack_q2_k>
                     : w.dtype == DType::Q3_K   ? matmul_integer<Format{256, true, 4, false}, unpack_q3_k>
                     : w.dtype == DType::Q8_0   ? matmul_integer<Format{32, false, 128, false}, unpack_q8_0>
                     : w.dtype == DType::IQ4_NL ? matmul_integer<Format{32, false, 128, false}, unpack_iq4_nl>
                     : w.dtype == DType::IQ4_XS ? matmul_integer<Format{256, false, 128, false}, unpack_iq4_xs>
                     : w.dtype == DType::Q4_K   ? matmul_integer<Format{256, false, 0, true}, unpack_q4_k>
                     : w.dtype == DType::Q5_K   ? matmul_integer<Format{256, false, 0, true}, unpack_q5_k>
                     : w.dtype == DType::Q6_K   ? matmul_integer<Format{256, true, 32, false}, unpack_q6_k>
                                                : matmul_float;
    multiply(w, x, panel_begin, panel_end, out, ld_out, scratch);
}

}  // namespace

void fill_matmul_scalar(Kernels& k) { k.matmul = matmul_scalar; }

}  // namespace gemmart::cpu
