#include "tensor.h"

#include "formats/all.h"

namespace gemmart {
namespace {

template <typename Block>
void decode_blocks(const void* src, float* dst, int64_t n) {
    const Block* blocks = static_cast<const Block*>(src);
    for (int64_t i = 0; i < n / Block::kSize; i++) decode(blocks[i], dst + i * Block::kSize);
}

}  // namespace

const std::vector<FormatInfo>& formats() {
    static const std::vector<FormatInfo> all = {
#define FORMAT(name, id, Block) {DType::name, #name, Block::kSize, sizeof(Block), decode_blocks<Block>},
#include "formats/formats.def"
#undef FORMAT
    };
    return all;
}

const FormatInfo* find_format(uint32_t gguf_id) {
    for (const FormatInfo& f : formats()) {
        if (static_cast<uint32_t>(f.dtype) == gguf_id) return &f;
    }
    return nullptr;
}

const FormatInfo& format_of(DType dtype) { return *find_format(static_cast<uint32_t>(dtype)); }

}  // namespace gemmart
