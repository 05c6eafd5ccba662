// A file in the address space, where no change of the file can end the process.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemmart {

// A range of bytes of an open file, shared with the page cache and read when they are touched. Where a page cannot be
// read any more, since somebody truncated the file or its device failed, it and all behind it read as zeros, and lost()
// says so.
class Mapping {
  public:
    Mapping(int fd, uint64_t offset, size_t n_bytes);  // any offset; throws OutOfMemory
    ~Mapping();
    Mapping(const Mapping&) = delete;

    const std::byte* data() const { return data_; }
    bool lost() const;
    void lock(size_t offset, size_t n) const;  // lock_memory() of n bytes from an offset in the range
    // Advice on n bytes from an offset in the range: read them in the background; or forget them, until they are
    // touched again.
    void prefetch(size_t offset, size_t n) const;
    void forget(size_t offset, size_t n) const;

  private:
    const std::byte* pages_;  // where the page begins that holds the first byte
    const std::byte* data_;
    size_t n_bytes_;
    int place_;  // in the table that the signal handler reads
};

// Keeps these bytes in memory, which is read or filled with zeros now: the system will not move them out. Throws
// OutOfMemory where a limit forbids it.
void lock_memory(const std::byte* data, size_t n);

}  // namespace gemmart
