// Fuzzes the GGUF reader with sanitizers: every mutated file is read through every accessor, or refused with an error
// of ours.
//
//   flags="-std=c++20 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover"
//   sources="csrc/gguf.cpp csrc/byte_source.cpp csrc/mapping.cpp csrc/tensor.cpp"
//   g++ $flags -Icsrc tests/fuzz_gguf.cpp $sources -o fuzz_gguf
//   ./fuzz_gguf [number of files [seed]]
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "error.h"
#include "gguf.h"

using namespace gemmart;

namespace {

void require(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "violated: %s\n", what);
    std::abort();
}

// Whether it returned; errors of ours are an answer too, anything else ends the process.
template <typename F>
bool succeeds(F read) {
    try {
        read();
        return true;
    } catch (const Error&) {
        return false;
    }
}

void look_at_everything(const GgufFile& file) {
    for (const MetaValue& v : file.metadata()) {
        const std::string& key = v.key;
        require(file.has(key) && &file.value(key) == &v, "a key is found again");
        uint64_t as_uint = 0;
        int64_t as_int = 0;
        double as_float = 0;
        const bool is_uint = succeeds([&] { as_uint = file.get_uint(key); });
        const bool is_int = succeeds([&] { as_int = file.get_int(key); });
        const bool is_number = succeeds([&] { as_float = file.get_float(key); });
        if (is_uint) require(as_float == static_cast<double>(as_uint), "get_float of an unsigned integer");
        if (is_int) require(as_float == static_cast<double>(as_int), "get_float of an integer");
        if (is_uint && is_int) require(as_uint == static_cast<uint64_t>(as_int), "get_int of an unsigned integer");
        const bool is_bool = succeeds([&] { file.get_bool(key); });
        const bool is_string = succeeds([&] { require(file.get_string(key).size() + 8 == v.n_bytes, "get_string"); });
        const bool is_array = succeeds([&] { require(file.array_length(key) == v.count, "array_length"); });
        require(is_number + is_bool + is_string + is_array == 1, "a value is a number, a bool, a string or an array");
        require(is_array == file.is_array(key), "is_array");
        succeeds([&] { require(file.get_floats(key).size() == v.count, "get_floats"); });
        succeeds([&] { require(file.get_ints(key).size() == v.count, "get_ints"); });
        succeeds([&] { require(file.get_strings(key).offsets.size() == v.count + 1, "get_strings"); });
    }
    std::vector<char> bytes;
    for (const Tensor& t : file.tensors()) {
        require(file.find(t.name) == &t, "a tensor is found again");
        bytes.resize(t.n_bytes);
        file.bytes().read(t.offset, bytes.data(), bytes.size());
    }
    file.bytes().check_unchanged();
}

// Reads the bytes as a part of a file in memory, with `around` before and after it; as two ranges, where `cut` says how
// long the first one is. Returns the error's message, "" for none.
std::string read_part(const uint8_t* data, size_t size, char around, size_t cut = 0) {
    constexpr size_t kMargin = 77;
    static const int fd = memfd_create("fuzz.gguf", 0);
    static const std::string path = "/proc/self/fd/" + std::to_string(fd);
    std::string bytes(size + 2 * kMargin, around);
    std::memcpy(&bytes[kMargin], data, size);
    require(ftruncate(fd, 0) == 0 && pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()),
            "the file is written");
    try {
        std::vector<Range> ranges{{path, kMargin, cut ? cut : size}};
        if (cut) ranges.push_back({path, kMargin + cut, size - cut});
        GgufFile file(std::move(ranges));
        look_at_everything(file);
        const GgufFile moved = std::move(file);
        look_at_everything(moved);
        return "";
    } catch (const Error& e) {
        return e.what();
    }
}

// The interface of fuzzing engines; returns whether the bytes were read. What lies around them must not matter.
int target(const uint8_t* data, size_t size) {
    const std::string answer = read_part(data, size, '\0');
    require(answer == read_part(data, size, '\xff'), "no byte outside is looked at");
    if (size > 1) {
        const size_t cut = 1 + size * 7 / 11 % (size - 1);
        require(answer == read_part(data, size, '\0', cut), "two ranges are read as one");
    }
    return answer.empty();
}

template <typename T>
void put(std::string& out, T x) {
    out.append(reinterpret_cast<const char*>(&x), sizeof x);
}

void put_string(std::string& out, std::string_view s) {
    put<uint64_t>(out, s.size());
    out += s;
}

// A small sound file: every type of value, alone and as an array, and three tensors.
std::string sound_file() {
    constexpr uint32_t kNumberTypes[] = {0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12};
    std::string out = "GGUF";
    put<uint32_t>(out, 3);
    put<uint64_t>(out, 3);
    put<uint64_t>(out, 3 + 2 * std::size(kNumberTypes));
    auto key = [&](const std::string& name, uint32_t type) {
        put_string(out, name);
        put(out, type);
    };
    key("general.alignment", 4);
    put<uint32_t>(out, 32);
    key("str", 8);
    put_string(out, "text");
    key("strs", 9);
    put<uint32_t>(out, 8);
    put<uint64_t>(out, 3);
    for (const char* s : {"", "one", "two"}) put_string(out, s);
    for (uint32_t type : kNumberTypes) {
        const size_t n_bytes = bytes_of(static_cast<ValueType>(type));
        key("n" + std::to_string(type), type);
        out.append(n_bytes, '\1');
        key("a" + std::to_string(type), 9);
        put(out, type);
        put<uint64_t>(out, 4);
        out.append(4 * n_bytes, '\1');
    }
    for (uint64_t i = 0; i < 3; i++) {
        put_string(out, "tensor" + std::to_string(i));
        put<uint32_t>(out, 2);
        put<uint64_t>(out, 32);
        put<uint64_t>(out, 1);
        put<uint32_t>(out, static_cast<uint32_t>(i));  // F32, F16, Q4_0
        put<uint64_t>(out, 128 * i);
    }
    out.resize((out.size() + 31) / 32 * 32 + 3 * 128, '\7');
    return out;
}

void mutate(std::string& bytes, std::mt19937_64& random) {
    constexpr uint64_t kHostile[] = {0, 1, 8, 1u << 31, UINT32_MAX, 1ull << 32, 1ull << 62, 1ull << 63, UINT64_MAX};
    const size_t at = random() % bytes.size();
    const size_t n = std::min<size_t>(bytes.size() - at, 1ull << random() % 5);
    switch (random() % 6) {
        case 0:
            bytes[at] ^= static_cast<char>(1 << random() % 8);
            break;
        case 1:
            bytes[at] = static_cast<char>(random());
            break;
        case 2:
            std::memcpy(&bytes[at], &kHostile[random() % std::size(kHostile)], std::min<size_t>(n, 8));
            break;
        case 3:
            bytes.erase(at, std::min(n, bytes.size() - 1));
            break;
        case 4:
            bytes.insert(at, bytes.substr(at, n));
            break;
        case 5:
            bytes.resize(at + 1);
            break;
    }
}

}  // namespace

int main(int argc, char** argv) {
    const long n = argc > 1 ? std::atol(argv[1]) : 10'000;
    std::mt19937_64 random(argc > 2 ? std::atol(argv[2]) : 0);
    const std::string sound = sound_file();
    require(target(reinterpret_cast<const uint8_t*>(sound.data()), sound.size()), "the sound file is read");
    long n_read = 0;
    for (long i = 0; i < n; i++) {
        std::string bytes = sound;
        for (uint64_t k = random() % 6; k-- > 0;) mutate(bytes, random);
        n_read += target(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    }
    std::printf("%ld files: %ld read, %ld refused\n", n, n_read, n - n_read);
    return 0;
}
