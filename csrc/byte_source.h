// The bytes of a model on disk: ranges of files, read as if they stood one after another in one file.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mapping.h"

namespace gemmart {

struct Range {
    std::string path;
    uint64_t offset = 0, length = 0;  // bytes; length 0: all to the end
};

// Positions count from the first byte of the first range.
class ByteSource {
  public:
    // Throws NotFound, FormatError (not a regular file), TruncatedError (a range that is empty or ends beyond its
    // file).
    explicit ByteSource(std::vector<Range> ranges);  // at least one
    ~ByteSource();
    ByteSource(const ByteSource&) = delete;

    const std::string& path() const { return parts_[0].range.path; }
    uint64_t size() const { return parts_.back().end(); }
    size_t n_ranges() const { return parts_.size(); }
    uint64_t begin(size_t range) const { return parts_[range].begin; }
    uint64_t size(size_t range) const { return parts_[range].range.length; }

    // Where a position lies on disk, for messages; the end of all lies at the end of the last range.
    struct Place {
        const std::string& path;
        uint64_t byte;
    };
    Place place(uint64_t position) const;

    // n bytes from a position. A short read throws FileChanged.
    void read(uint64_t position, void* dst, size_t n) const;
    // Takes these bytes out of the system's cache of files: they will not be wanted again soon.
    void drop_cached(uint64_t position, size_t n) const;
    // Throws FileChanged if size or time of modification of a file are not those at the opening. (Who deletes or
    // replaces a file does no harm: the old one stays open.)
    void check_unchanged() const;
    // Whether one range holds all n bytes.
    bool in_one_range(uint64_t position, size_t n) const;

  private:
    friend class MappedSource;
    struct Part {
        Range range;
        uint64_t begin;  // its position
        int fd;
        struct stat opened;
        uint64_t end() const { return begin + range.length; }
    };

    const Part& part_at(uint64_t position) const;
    // visit(part, offset in its file, bytes) for each part that holds some of the n bytes, in order.
    template <typename F>
    void each_part(uint64_t position, size_t n, F visit) const;

    std::vector<Part> parts_;
};

// All ranges of a source in the address space, each by itself.
class MappedSource {
  public:
    explicit MappedSource(const ByteSource& source);  // which must live as long; throws OutOfMemory
    // n bytes of one range.
    const std::byte* at(uint64_t position) const;
    bool lost() const;  // as Mapping has it
    void prefetch(uint64_t position, size_t n) const;
    void forget(uint64_t position, size_t n) const;
    void lock(uint64_t position, size_t n) const;

  private:
    const Mapping& mapping_at(uint64_t position) const;

    const ByteSource& source_;
    std::vector<std::unique_ptr<Mapping>> mappings_;
};

}  // namespace gemmart
