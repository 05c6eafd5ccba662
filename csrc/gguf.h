// A GGUF file (version 2 or 3, little-endian): metadata and tensor table, read and checked. Knows no model.
//
//   "GGUF"  version u32  n_tensors u64  n_kv u64
//   n_kv ×       key string, value type u32, value           string: length u64, bytes
//   n_tensors ×  name string, n_dims u32, n_dims × size u64 (the contiguous one first), type u32, offset u64
//   padding to general.alignment, then the tensors; their offsets count from here
//
// A model may be split into several such files. All metadata is in the first; split.no (from 0), split.count and
// split.tensors.count tell which one of how many a file is, and each has its own tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "byte_source.h"
#include "tensor.h"

namespace gemmart {

enum class ValueType : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

const char* name_of(ValueType type);  // "u32", "bool", "str" …
size_t bytes_of(ValueType type);      // of one value; 0 for strings and arrays

struct MetaValue {
    std::string key;
    ValueType type;  // of the elements, for an array
    bool is_array;
    uint64_t count;         // 1 for a scalar
    const std::byte* data;  // in this object's memory; a string: after its length, strings: with all lengths
    uint64_t n_bytes;
};

struct StringArray {
    std::string blob;              // all strings, joined
    std::vector<int64_t> offsets;  // [n + 1]; string i is blob[offsets[i], offsets[i + 1])
};

class GgufFile {
  public:
    // The GGUF file that the ranges hold, one after another; or the files of a split model, one a range, in order.
    // Throws NotFound, FormatError, TruncatedError, UnsupportedError (a tensor type that formats.def lacks).
    explicit GgufFile(std::vector<Range> ranges);

    const ByteSource& bytes() const { return *bytes_; }
    const std::string& path() const { return path_; }  // of the first range
    uint32_t version() const { return version_; }

    // Metadata, in the order of the file. The getters throw FormatError that names key, wanted and found type; with
    // `fallback`, a missing key gives that (a key of the wrong type still throws).
    const std::vector<MetaValue>& metadata() const { return metadata_; }
    bool has(std::string_view key) const { return lookup(key) != nullptr; }
    const MetaValue& value(std::string_view key) const;
    std::string type_of(std::string_view key) const;  // "u32", "str[]" …
    bool is_array(std::string_view key) const { return value(key).is_array; }

    uint64_t get_uint(std::string_view key) const;  // any integer type, value >= 0
    int64_t get_int(std::string_view key) const;    // any integer type
    double get_float(std::string_view key) const;   // any integer or float type
    bool get_bool(std::string_view key) const;
    std::string_view get_string(std::string_view key) const;  // lives as long as the file is open

    uint64_t get_uint(std::string_view key, uint64_t fallback) const { return has(key) ? get_uint(key) : fallback; }
    int64_t get_int(std::string_view key, int64_t fallback) const { return has(key) ? get_int(key) : fallback; }
    double get_float(std::string_view key, double fallback) const { return has(key) ? get_float(key) : fallback; }
    bool get_bool(std::string_view key, bool fallback) const { return has(key) ? get_bool(key) : fallback; }
    std::string_view get_string(std::string_view key, std::string_view fallback) const {
        return has(key) ? get_string(key) : fallback;
    }

    uint64_t array_length(std::string_view key) const;
    std::vector<double> get_floats(std::string_view key) const;  // f32 or f64
    std::vector<int64_t> get_ints(std::string_view key) const;   // any integer type
    StringArray get_strings(std::string_view key) const;

    const std::vector<Tensor>& tensors() const { return tensors_; }  // in the order of the file
    const Tensor* find(std::string_view name) const;                 // nullptr where there is none

  private:
    // As much of the beginning of a file as has been read.
    struct Head;
    struct FreeHead {
        void operator()(Head* head) const;
    };

    explicit GgufFile(std::shared_ptr<const ByteSource> bytes);
    // The one file in `size` bytes from a position, the first byte of a range.
    GgufFile(std::shared_ptr<const ByteSource> bytes, uint64_t begin, uint64_t size);
    void check_split(uint64_t number, uint64_t n_files) const;
    void index_tensors();

    const MetaValue* lookup(std::string_view key) const;
    // The value, a scalar or an array as told, of a type that is `good`; else FormatError that names `wanted`.
    const MetaValue& typed(std::string_view key, const char* wanted, bool (*good)(ValueType), bool is_array) const;
    int64_t as_int64(const MetaValue& v, const std::byte* data) const;

    std::shared_ptr<const ByteSource> bytes_;
    std::string path_;
    std::unique_ptr<Head, FreeHead> head_;
    uint32_t version_ = 0;
    std::vector<MetaValue> metadata_;
    std::vector<Tensor> tensors_;
    std::unordered_map<std::string_view, size_t> key_index_;   // views into metadata_
    std::unordered_map<std::string_view, size_t> name_index_;  // views into tensors_
};

// A tensor of one dimension as floats.
std::vector<float> load_vector(const GgufFile& file, const Tensor& tensor);

}  // namespace gemmart
