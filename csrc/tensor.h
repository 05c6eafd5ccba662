// DType: how numbers are stored (one per row of formats/formats.def). Tensor: a view of stored numbers; it owns
// nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace gemmart {

enum class DType : uint32_t {  // the values are GGUF's type ids
#define FORMAT(name, id, Block) name = id,
#include "formats/formats.def"
#undef FORMAT
};

struct FormatInfo {
    DType dtype;
    const char* name;
    int block_size;   // weights a block
    int block_bytes;  // bytes a block
    // dst [n] float <- src, n weights; n a multiple of block_size. Exactly the values that the format defines.
    void (*decode)(const void* src, float* dst, int64_t n);
};

const std::vector<FormatInfo>& formats();         // in the order of formats.def
const FormatInfo* find_format(uint32_t gguf_id);  // nullptr where there is none
const FormatInfo& format_of(DType dtype);
inline size_t row_bytes(const FormatInfo& f, int64_t n_cols) {
    return static_cast<size_t>(n_cols) / f.block_size * f.block_bytes;
}

struct Tensor {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;  // NumPy's order: the last one is contiguous. 1 to 4 dimensions
    uint64_t offset;             // its position in the ByteSource that it comes from
    uint64_t n_bytes;
};

}  // namespace gemmart
