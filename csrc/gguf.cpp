#include "gguf.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>

#include "error.h"

namespace gemmart {
namespace {

static_assert(std::endian::native == std::endian::little && sizeof(size_t) == 8);

constexpr std::string_view kMagic = "GGUF";
constexpr uint64_t kMaxKeys = 65'536;
constexpr uint64_t kMaxTensors = 262'144;
constexpr uint64_t kMaxKeyBytes = 65'535;
constexpr uint64_t kMaxNameBytes = 64;
constexpr uint64_t kMaxStringBytes = 64 << 20;
constexpr uint64_t kMaxArrayLength = 1 << 26;
constexpr uint32_t kMaxDims = 4;
constexpr uint64_t kMinAlignment = 8, kMaxAlignment = 65'536, kDefaultAlignment = 32;
constexpr uint64_t kMaxWeights = std::numeric_limits<int64_t>::max();

// Each length, key or value takes at least so many bytes: what bounds a count by the size of the file.
constexpr uint64_t kMinBytesOfString = 8, kMinBytesOfKey = 8 + 1 + 4 + 1, kMinBytesOfTensor = 8 + 1 + 4 + 8 + 4 + 8;

struct TypeRow {
    const char* name;
    size_t n_bytes;
};
constexpr TypeRow kTypes[] = {
    // indexed by ValueType
    {"u8", 1},   {"i8", 1},  {"u16", 2},   {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
    {"bool", 1}, {"str", 0}, {"array", 0}, {"u64", 8}, {"i64", 8}, {"f64", 8},
};

template <typename T>
T load(const std::byte* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

bool is_string(ValueType type) { return type == ValueType::string; }

bool is_float(ValueType type) { return type == ValueType::f32 || type == ValueType::f64; }

bool is_integer(ValueType type) {
    return !is_float(type) && type != ValueType::boolean && !is_string(type) && type != ValueType::array;
}

double load_float(ValueType type, const std::byte* p) {
    return type == ValueType::f32 ? load<float>(p) : load<double>(p);
}

__int128 load_integer(ValueType type, const std::byte* p) {  // holds i64 and u64
    switch (type) {
        case ValueType::u8:
            return load<uint8_t>(p);
        case ValueType::i8:
            return load<int8_t>(p);
        case ValueType::u16:
            return load<uint16_t>(p);
        case ValueType::i16:
            return load<int16_t>(p);
        case ValueType::u32:
            return load<uint32_t>(p);
        case ValueType::i32:
            return load<int32_t>(p);
        case ValueType::u64:
            return load<uint64_t>(p);
        default:
            return load<int64_t>(p);
    }
}

// A key can be 64 KiB long; a message need not.
std::string quoted(std::string_view name) {
    constexpr size_t kShown = 100;
    return name.size() <= kShown ? message("'", name, "'") : message("'", name.substr(0, kShown), "…'");
}

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (int64_t n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
    return text + "]";
}

// Reads forward through metadata; what it hands out lies within the file. It stays where a read failed.
class Reader {
  public:
    // fetch(n): brings the first n bytes of the data, or more, and returns how many it has brought. Without it all are
    // there.
    using Fetch = std::function<uint64_t(uint64_t n)>;

    // `begin`: where the data begin in `source`, for messages.
    Reader(const ByteSource& source, uint64_t begin, const std::byte* data, uint64_t size, Fetch fetch = nullptr)
        : source_(source), begin_(begin), data_(data), size_(size), fetch_(fetch), n_there_(fetch ? 0 : size) {}

    // What is read now, for messages: "value of key" 'general.name'. `name` must outlive the reads.
    void now(const char* field, std::string_view name = {}) {
        field_ = field;
        name_ = name;
        field_at_ = at_;
    }

    uint64_t position() const { return at_; }
    const std::byte* here() const { return data_ + at_; }

    const std::byte* bytes(uint64_t n) {
        if (n > size_ - at_) truncated(n, "bytes");
        if (at_ + n > n_there_) n_there_ = fetch_(at_ + n);
        const std::byte* p = data_ + at_;
        at_ += n;
        return p;
    }

    template <typename T>
    T number() {
        return load<T>(bytes(sizeof(T)));
    }

    // A u64 that announces things of at least `min_bytes` each.
    uint64_t count(const char* unit, uint64_t limit, uint64_t min_bytes) {
        field_at_ = at_;
        const uint64_t n = number<uint64_t>();
        if (n > limit) fail<FormatError>("announces ", n, " ", unit, ", limit ", limit);
        if (n > (size_ - at_) / min_bytes) truncated(n, unit);
        return n;
    }

    std::string_view string(uint64_t limit = kMaxStringBytes) {
        const uint64_t n = count("bytes", limit, 1);
        return {reinterpret_cast<const char*>(bytes(n)), n};
    }

    // A key or tensor name: GGUF wants ASCII.
    std::string name(uint64_t limit) {
        const std::string_view s = string(limit);
        if (s.empty()) fail<FormatError>("is empty");
        const bool printable = std::all_of(s.begin(), s.end(), [](char c) { return c >= ' ' && c <= '~'; });
        if (!printable) fail<FormatError>("is not printable ASCII");
        return std::string(s);
    }

    template <typename E, typename... Parts>
    [[noreturn]] void fail(const Parts&... parts) const {
        const auto [path, byte] = source_.place(begin_ + field_at_);
        throw E(message(path, ": ", field(), " at byte ", byte, " ", parts...));
    }

  private:
    std::string field() const { return name_.empty() ? field_ : message(field_, " ", quoted(name_)); }

    [[noreturn]] void truncated(uint64_t n, const char* unit) const {
        const auto [path, byte] = source_.place(begin_ + at_);
        throw TruncatedError(message(path, ": ends inside ", field(), ": ", n, " ", unit, " wanted at byte ", byte,
                                     ", ", size_ - at_, " bytes present"));
    }

    const ByteSource& source_;
    uint64_t begin_;
    const std::byte* data_;
    uint64_t size_;
    Fetch fetch_;
    uint64_t n_there_;
    uint64_t at_ = 0;
    uint64_t field_at_ = 0;
    const char* field_ = "";
    std::string_view name_;
};

// What a file is that does not start with "GGUF"; empty: unknown.
std::string kind_of(std::string_view head) {
    struct Kind {
        std::string_view start;
        const char* what;
    };
    static constexpr Kind kKinds[] = {
        {"version https://git-lfs", "a Git LFS pointer (`git lfs pull` fetches the file itself)"},
        {"PK\3\4", "a ZIP archive"},
        {"PK\5\6", "a ZIP archive"},
        {"\x1f\x8b", "a gzip file"},
        {"lmgg", "a model in an older format of GGML (convert it to GGUF)"},
        {"fmgg", "a model in an older format of GGML (convert it to GGUF)"},
        {"tjgg", "a model in an older format of GGML (convert it to GGUF)"},
    };
    for (const Kind& kind : kKinds) {
        if (head.starts_with(kind.start)) return kind.what;
    }
    if (head.size() > 8 && head[7] == 0 && head[8] == '{') return "a safetensors file (convert it to GGUF)";
    const size_t text = head.find_first_not_of(" \t\r\n\xef\xbb\xbf");
    if (text != std::string_view::npos && head[text] == '<') return "an HTML or XML page (the wrong link?)";
    return {};
}

void check_magic(const std::string& path, std::string_view head) {
    check<TruncatedError>(!head.empty(), path, ": is empty");
    check<TruncatedError>(head.size() >= kMagic.size() || !kMagic.starts_with(head), path,
                          ": ends inside the magic: ", kMagic.size(), " bytes wanted, ", head.size(), " bytes present");
    if (head.starts_with(kMagic)) return;
    const std::string kind = kind_of(head);
    throw FormatError(message(path, ": is not a GGUF file", kind.empty() ? "" : " but ", kind));
}

uint32_t read_version(Reader& in) {
    in.now("the version");
    const uint32_t version = in.number<uint32_t>();
    if (version == 2 || version == 3) return version;
    if (version != 0 && version % 65'536 == 0)
        in.fail<FormatError>("shows a big-endian file; only little-endian ones are read");
    in.fail<FormatError>("is ", version, "; 2 and 3 are read");
}

MetaValue read_value(Reader& in) {
    MetaValue v;
    in.now("a key");
    v.key = in.name(kMaxKeyBytes);

    auto read_type = [&](const char* field) {
        in.now(field, v.key);
        const uint32_t id = in.number<uint32_t>();
        if (id >= std::size(kTypes)) in.fail<FormatError>("is ", id, ", which is none of GGUF's");
        return static_cast<ValueType>(id);
    };
    v.type = read_type("the type of key");
    v.is_array = v.type == ValueType::array;
    v.count = 1;
    if (v.is_array) {
        v.type = read_type("the element type of key");
        if (v.type == ValueType::array) in.fail<FormatError>("is array; nested arrays are not read");
        in.now("the value of key", v.key);
        const size_t min_bytes = v.type == ValueType::string ? kMinBytesOfString : bytes_of(v.type);
        v.count = in.count("values", kMaxArrayLength, min_bytes);
    }

    in.now("the value of key", v.key);
    v.data = in.here();
    if (v.type == ValueType::string) {
        for (uint64_t i = 0; i < v.count; i++) in.string();
    } else {
        in.bytes(v.count * bytes_of(v.type));
    }
    v.n_bytes = static_cast<uint64_t>(in.here() - v.data);
    if (v.type == ValueType::boolean) {
        const bool good = std::all_of(v.data, v.data + v.n_bytes, [](std::byte b) { return b <= std::byte{1}; });
        if (!good) in.fail<FormatError>("has a bool that is neither 0 nor 1");
    }
    return v;
}

// The offset is the file's own, from the start of the tensor data; the data come later.
Tensor read_tensor(Reader& in, uint64_t alignment) {
    Tensor t;
    in.now("a tensor name");
    t.name = in.name(kMaxNameBytes);

    in.now("the dimensions of tensor", t.name);
    const uint32_t n_dims = in.number<uint32_t>();
    if (n_dims < 1 || n_dims > kMaxDims) in.fail<FormatError>("are ", n_dims, "; 1 to ", kMaxDims, " are allowed");
    uint64_t n_weights = 1;
    for (uint32_t i = 0; i < n_dims; i++) {
        const uint64_t n = in.number<uint64_t>();
        if (n < 1 || n > kMaxWeights / n_weights) {
            in.fail<FormatError>("have size ", n, "; sizes are at least 1 and their product at most ", kMaxWeights);
        }
        n_weights *= n;
        t.shape.insert(t.shape.begin(), static_cast<int64_t>(n));
    }

    in.now("the type of tensor", t.name);
    const uint32_t type_id = in.number<uint32_t>();
    const FormatInfo* format = find_format(type_id);
    if (!format) in.fail<UnsupportedError>("is ", type_id, ", a storage format that this build does not read");
    if (t.shape.back() % format->block_size != 0) {
        in.fail<FormatError>("is ", format->name, ", stored in blocks of ", format->block_size, ", but its shape is ",
                             shape_text(t.shape));
    }
    t.dtype = format->dtype;
    const uint64_t n_blocks = n_weights / format->block_size;
    const uint64_t block_bytes = format->block_bytes;
    if (n_blocks > kMaxWeights / block_bytes) {
        in.fail<FormatError>("is ", format->name, ", shape ", shape_text(t.shape), ": more than ", kMaxWeights,
                             " bytes");
    }
    t.n_bytes = n_blocks * block_bytes;

    in.now("the offset of tensor", t.name);
    t.offset = in.number<uint64_t>();
    if (t.offset % alignment != 0) in.fail<FormatError>("is ", t.offset, ", no multiple of the alignment ", alignment);
    return t;
}

// Maps each name to its place; a name that comes twice is refused, for the file that path(of this one) names.
template <typename Named, typename Name, typename Path>
std::unordered_map<std::string_view, size_t> index_of(const std::vector<Named>& list, Name name, const char* what,
                                                      Path path) {
    std::unordered_map<std::string_view, size_t> index;
    index.reserve(list.size());
    for (size_t i = 0; i < list.size(); i++) {
        const bool is_new = index.emplace(name(list[i]), i).second;
        check<FormatError>(is_new, path(list[i]), ": ", what, " ", quoted(name(list[i])), " comes twice");
    }
    return index;
}

// Offsets are positions in the source, none beyond it.
void check_overlap(const ByteSource& source, const std::vector<Tensor>& tensors) {
    std::vector<const Tensor*> sorted;
    for (const Tensor& t : tensors) sorted.push_back(&t);
    std::sort(sorted.begin(), sorted.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
    for (size_t i = 1; i < sorted.size(); i++) {
        const Tensor &a = *sorted[i - 1], &b = *sorted[i];
        if (b.offset - a.offset >= a.n_bytes) continue;
        const auto [path, byte] = source.place(b.offset);
        throw FormatError(message(path, ": tensor ", quoted(b.name), " at byte ", byte, " overlaps tensor ",
                                  quoted(a.name), " at byte ", source.place(a.offset).byte, ", ", a.n_bytes,
                                  " bytes long"));
    }
}

// Bytes of the first file: of its own range, where the next one is a file too; of all ranges, where they are slices.
uint64_t size_of_first(const ByteSource& bytes) {
    char magic[4] = {};
    if (bytes.n_ranges() > 1 && bytes.size(1) >= sizeof magic) bytes.read(bytes.begin(1), magic, sizeof magic);
    return std::string_view(magic, sizeof magic) == kMagic ? bytes.size(0) : bytes.size();
}

}  // namespace

const char* name_of(ValueType type) { return kTypes[static_cast<size_t>(type)].name; }
size_t bytes_of(ValueType type) { return kTypes[static_cast<size_t>(type)].n_bytes; }

// The metadata is read, not mapped: where somebody truncates a mapped file, looking at it ends the process.
struct GgufFile::Head {
    void* data;  // address space for all of the file; memory only where it was read
    uint64_t size;
};

void GgufFile::FreeHead::operator()(Head* head) const {
    munmap(head->data, head->size);
    delete head;
}

GgufFile::GgufFile(std::vector<Range> ranges) : GgufFile(std::make_shared<const ByteSource>(std::move(ranges))) {}

GgufFile::GgufFile(std::shared_ptr<const ByteSource> bytes) : GgufFile(bytes, 0, size_of_first(*bytes)) {
    const uint64_t n_files = get_uint("split.count", 1);
    if (n_files <= 1) return;
    check<FormatError>(n_files == bytes_->n_ranges(), path_, ": key 'split.count' is ", n_files,
                       ": one of so many files that are read together, but here are ", bytes_->n_ranges());
    check_split(0, n_files);
    for (uint64_t i = 1; i < n_files; i++) {
        GgufFile part(bytes_, bytes_->begin(i), bytes_->size(i));
        part.check_split(i, n_files);
        std::move(part.tensors_.begin(), part.tensors_.end(), std::back_inserter(tensors_));
    }
    index_tensors();
    const uint64_t n_tensors = get_uint("split.tensors.count");
    check<FormatError>(tensors_.size() == n_tensors, path_, ": key 'split.tensors.count' is ", n_tensors, ", but the ",
                       n_files, " files have ", tensors_.size(), " tensors");
}

GgufFile::GgufFile(std::shared_ptr<const ByteSource> bytes, uint64_t begin, uint64_t size)
    : bytes_(std::move(bytes)), path_(bytes_->place(begin).path) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check<OutOfMemory>(data != MAP_FAILED, path_, ": no address space for ", size, " bytes");
    head_.reset(new Head{data, size});
    auto* start = static_cast<std::byte*>(data);
    uint64_t n_read = 0;
    const auto fetch = [&](uint64_t n) {
        constexpr uint64_t kStep = 1 << 20;
        const uint64_t n_more = n > n_read ? std::min(size - n_read, std::max(n - n_read, kStep)) : 0;
        bytes_->read(begin + n_read, start + n_read, n_more);
        return n_read += n_more;
    };

    fetch(std::min<uint64_t>(size, 64));
    check_magic(path_, {reinterpret_cast<const char*>(start), std::min<uint64_t>(size, 64)});
    Reader in(*bytes_, begin, start, size, fetch);
    in.bytes(4);
    version_ = read_version(in);
    in.now("the number of tensors");
    const uint64_t n_tensors = in.count("tensors", kMaxTensors, kMinBytesOfTensor);
    in.now("the number of keys");
    const uint64_t n_keys = in.count("keys", kMaxKeys, kMinBytesOfKey);

    metadata_.reserve(n_keys);
    for (uint64_t i = 0; i < n_keys; i++) metadata_.push_back(read_value(in));
    key_index_ = index_of(
        metadata_, [](const MetaValue& v) -> std::string_view { return v.key; }, "key",
        [&](const MetaValue&) { return path_; });

    const uint64_t alignment = get_uint("general.alignment", kDefaultAlignment);
    check<FormatError>(std::has_single_bit(alignment) && alignment >= kMinAlignment && alignment <= kMaxAlignment,
                       path_, ": key 'general.alignment' is ", alignment, ", expected a power of two, ", kMinAlignment,
                       " to ", kMaxAlignment);
    tensors_.reserve(n_tensors);
    for (uint64_t i = 0; i < n_tensors; i++) tensors_.push_back(read_tensor(in, alignment));
    const uint64_t data_start = (in.position() + alignment - 1) / alignment * alignment;
    const uint64_t data_size = size > data_start ? size - data_start : 0;
    for (Tensor& t : tensors_) {
        check<TruncatedError>(t.offset <= data_size && t.n_bytes <= data_size - t.offset, path_,
                              ": ends inside tensor ", quoted(t.name), ": ", t.n_bytes, " bytes wanted at offset ",
                              t.offset, " of the data, ", data_size, " bytes of data present");
        t.offset += begin + data_start;
    }
    index_tensors();
    check_overlap(*bytes_, tensors_);
}

void GgufFile::check_split(uint64_t number, uint64_t n_files) const {
    for (const auto& [key, wanted] : {std::pair("split.count", n_files), std::pair("split.no", number)}) {
        const uint64_t found = get_uint(key);
        check<FormatError>(found == wanted, path_, ": key '", key, "' is ", found, ", expected ", wanted,
                           ": this is not part ", number + 1, " of the ", n_files, " of the model at ", bytes_->path());
    }
}

void GgufFile::index_tensors() {
    name_index_ = index_of(
        tensors_, [](const Tensor& t) -> std::string_view { return t.name; }, "tensor",
        [&](const Tensor& t) { return bytes_->place(t.offset).path; });
}

const MetaValue* GgufFile::lookup(std::string_view key) const {
    const auto found = key_index_.find(key);
    return found == key_index_.end() ? nullptr : &metadata_[found->second];
}

const MetaValue& GgufFile::value(std::string_view key) const {
    const MetaValue* v = lookup(key);
    check<FormatError>(v, path_, ": key ", quoted(key), " is missing");
    return *v;
}

std::string GgufFile::type_of(std::string_view key) const {
    const MetaValue& v = value(key);
    return message(name_of(v.type), v.is_array ? "[]" : "");
}

const MetaValue& GgufFile::typed(std::string_view key, const char* wanted, bool (*good)(ValueType),
                                 bool is_array) const {
    const MetaValue& v = value(key);
    check<FormatError>(v.is_array == is_array && good(v.type), path_, ": key ", quoted(key), " is ", type_of(key),
                       ", expected ", wanted);
    return v;
}

uint64_t GgufFile::get_uint(std::string_view key) const {
    const MetaValue& v = typed(key, "an integer", is_integer, false);
    const __int128 n = load_integer(v.type, v.data);
    check<FormatError>(n >= 0, path_, ": key ", quoted(key), " is ", static_cast<int64_t>(n), ", expected at least 0");
    return static_cast<uint64_t>(n);
}

int64_t GgufFile::get_int(std::string_view key) const {
    const MetaValue& v = typed(key, "an integer", is_integer, false);
    return as_int64(v, v.data);
}

double GgufFile::get_float(std::string_view key) const {
    const auto is_number = [](ValueType type) { return is_integer(type) || is_float(type); };
    const MetaValue& v = typed(key, "a number", is_number, false);
    return is_float(v.type) ? load_float(v.type, v.data) : static_cast<double>(load_integer(v.type, v.data));
}

bool GgufFile::get_bool(std::string_view key) const {
    return load<uint8_t>(
               typed(key, "bool", [](ValueType type) { return type == ValueType::boolean; }, false).data) != 0;
}

std::string_view GgufFile::get_string(std::string_view key) const {
    const MetaValue& v = typed(key, "str", is_string, false);
    return {reinterpret_cast<const char*>(v.data) + sizeof(uint64_t), v.n_bytes - sizeof(uint64_t)};
}

uint64_t GgufFile::array_length(std::string_view key) const {
    return typed(key, "an array", [](ValueType) { return true; }, true).count;
}

std::vector<double> GgufFile::get_floats(std::string_view key) const {
    const MetaValue& v = typed(key, "f32[] or f64[]", is_float, true);
    std::vector<double> out(v.count);
    for (uint64_t i = 0; i < v.count; i++) out[i] = load_float(v.type, v.data + i * bytes_of(v.type));
    return out;
}

std::vector<int64_t> GgufFile::get_ints(std::string_view key) const {
    const MetaValue& v = typed(key, "an array of integers", is_integer, true);
    std::vector<int64_t> out(v.count);
    for (uint64_t i = 0; i < v.count; i++) out[i] = as_int64(v, v.data + i * bytes_of(v.type));
    return out;
}

StringArray GgufFile::get_strings(std::string_view key) const {
    const MetaValue& v = typed(key, "str[]", is_string, true);
    StringArray out;
    out.blob.reserve(v.n_bytes - v.count * kMinBytesOfString);
    out.offsets.reserve(v.count + 1);
    out.offsets.push_back(0);
    Reader in(*bytes_, 0, v.data, v.n_bytes);
    in.now("the value of key", v.key);
    for (uint64_t i = 0; i < v.count; i++) {
        out.blob += in.string();
        out.offsets.push_back(static_cast<int64_t>(out.blob.size()));
    }
    return out;
}

int64_t GgufFile::as_int64(const MetaValue& v, const std::byte* data) const {
    const __int128 n = load_integer(v.type, data);
    check<FormatError>(n <= std::numeric_limits<int64_t>::max(), path_, ": key ", quoted(v.key), " is ",
                       static_cast<uint64_t>(n), ", more than 2^63 - 1");
    return static_cast<int64_t>(n);
}

const Tensor* GgufFile::find(std::string_view name) const {
    const auto found = name_index_.find(name);
    return found == name_index_.end() ? nullptr : &tensors_[found->second];
}

std::vector<float> load_vector(const GgufFile& file, const Tensor& tensor) {
    std::vector<std::byte> raw(tensor.n_bytes);
    file.bytes().read(tensor.offset, raw.data(), raw.size());
    std::vector<float> out(tensor.shape[0]);
    format_of(tensor.dtype).decode(raw.data(), out.data(), tensor.shape[0]);
    return out;
}

}  // namespace gemmart
