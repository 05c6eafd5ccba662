// Model families: each is one page of facts over the dense decoder of decoder.h.
#pragma once

#include "decoder.h"
#include "gguf.h"

namespace gemmart {

// What the file's metadata says of its model; throws UnsupportedError for a family that is not known, FormatError for
// values out of bounds.
Config read_config(const GgufFile& file);

// For the families' pages.

// Everything that no family says otherwise: sizes, norms' epsilon; one rope of the file's base and scaling for all
// layers; query scale 1 / sqrt(head_dim); no windows, no caps.
Config dense_facts(const GgufFile& file, bool neox, double default_rope_base);
// Angle a position of each pair: base^(-2i / head_dim) / factor. The power is rounded to float32 first, as Google's and
// Meta's own code does.
RopeFacts rope_facts(int head_dim, double base, double factor, bool neox);
// `<family>.<name>`
std::string family_key(const GgufFile& file, const char* name);

Config gemma_facts(const GgufFile& file);
Config gemma2_facts(const GgufFile& file);
Config gemma3_facts(const GgufFile& file);
Config llama_facts(const GgufFile& file);

}  // namespace gemmart
