#include "byte_source.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.h"

namespace gemmart {
namespace {

int open_file(const std::string& path) {
    check<NotFound>(path.find('\0') == std::string::npos, "the path has a NUL byte: ", path.c_str());
    // A FIFO or device must not block.
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    const int error = errno;
    check<NotFound>(fd >= 0, path, ": cannot be opened: ", std::strerror(error));
    return fd;
}

}  // namespace

ByteSource::ByteSource(std::vector<Range> ranges) {
    parts_.reserve(ranges.size());
    uint64_t begin = 0;
    try {
        for (Range& range : ranges) {
            const std::string path = range.path;
            Part& part = parts_.emplace_back(Part{std::move(range), begin, open_file(path), {}});
            check<NotFound>(fstat(part.fd, &part.opened) == 0, path, ": cannot be examined");
            check<FormatError>(!S_ISDIR(part.opened.st_mode), path, ": is a folder, not a GGUF file");
            check<FormatError>(S_ISREG(part.opened.st_mode), path, ": is not a regular file");

            const uint64_t file_size = static_cast<uint64_t>(part.opened.st_size), offset = part.range.offset;
            uint64_t& length = part.range.length;
            check<TruncatedError>(offset <= file_size && length <= file_size - offset, path, ": ends at byte ",
                                  file_size, "; ", length, " bytes wanted from byte ", offset);
            if (!length) length = file_size - offset;
            check<TruncatedError>(length > 0, path, ": is empty", offset ? message(" from byte ", offset) : "");
            begin += length;  // of two numbers below 2^63
            check<FormatError>(begin <= INT64_MAX, path, ": the parts of the model are together more than 2^63 bytes");
        }
    } catch (...) {
        for (const Part& part : parts_) close(part.fd);
        throw;
    }
}

ByteSource::~ByteSource() {
    for (const Part& part : parts_) close(part.fd);
}

const ByteSource::Part& ByteSource::part_at(uint64_t position) const {
    const auto after = std::upper_bound(parts_.begin(), parts_.end(), position,
                                        [](uint64_t position, const Part& part) { return position < part.begin; });
    return *(after - 1);
}

ByteSource::Place ByteSource::place(uint64_t position) const {
    const Part& part = part_at(position);
    return {part.range.path, part.range.offset + (position - part.begin)};
}

template <typename F>
void ByteSource::each_part(uint64_t position, size_t n, F visit) const {
    while (n > 0) {
        const Part& part = part_at(position);
        const size_t n_here = std::min<uint64_t>(n, part.end() - position);
        visit(part, static_cast<off_t>(part.range.offset + (position - part.begin)), n_here);
        position += n_here;
        n -= n_here;
    }
}

void ByteSource::read(uint64_t position, void* dst, size_t n) const {
    auto* to = static_cast<std::byte*>(dst);
    each_part(position, n, [&](const Part& part, off_t offset, size_t n_here) {
        for (size_t done = 0; done < n_here;) {
            const ssize_t got = pread(part.fd, to + done, n_here - done, offset + static_cast<off_t>(done));
            if (got < 0 && errno == EINTR) continue;
            check<FileChanged>(got > 0, part.range.path, ": ", n_here, " bytes wanted at byte ", offset, ", ", done,
                               " could be read", got < 0 ? message(": ", std::strerror(errno)) : "");
            done += static_cast<size_t>(got);
        }
        to += n_here;
    });
}

void ByteSource::drop_cached([[maybe_unused]] uint64_t position, [[maybe_unused]] size_t n) const {
#ifdef POSIX_FADV_DONTNEED
    each_part(position, n, [](const Part& part, off_t offset, size_t n_here) {
        posix_fadvise(part.fd, offset, static_cast<off_t>(n_here), POSIX_FADV_DONTNEED);
    });
#endif
}

void ByteSource::check_unchanged() const {
    for (const Part& part : parts_) {
        struct stat now;
        const struct stat& then = part.opened;
        const bool same = fstat(part.fd, &now) == 0 && now.st_size == then.st_size &&
                          now.st_mtim.tv_sec == then.st_mtim.tv_sec && now.st_mtim.tv_nsec == then.st_mtim.tv_nsec;
        check<FileChanged>(same, part.range.path, ": was changed after it was opened; load it again");
    }
}

bool ByteSource::in_one_range(uint64_t position, size_t n) const { return n <= part_at(position).end() - position; }

MappedSource::MappedSource(const ByteSource& source) : source_(source) {
    for (const ByteSource::Part& part : source.parts_)
        mappings_.push_back(std::make_unique<Mapping>(part.fd, part.range.offset, part.range.length));
}

const Mapping& MappedSource::mapping_at(uint64_t position) const {
    return *mappings_[&source_.part_at(position) - source_.parts_.data()];
}

const std::byte* MappedSource::at(uint64_t position) const {
    return mapping_at(position).data() + (position - source_.part_at(position).begin);
}

bool MappedSource::lost() const {
    return std::any_of(mappings_.begin(), mappings_.end(), [](const auto& mapping) { return mapping->lost(); });
}

void MappedSource::prefetch(uint64_t position, size_t n) const {
    mapping_at(position).prefetch(position - source_.part_at(position).begin, n);
}

void MappedSource::forget(uint64_t position, size_t n) const {
    mapping_at(position).forget(position - source_.part_at(position).begin, n);
}

void MappedSource::lock(uint64_t position, size_t n) const {
    mapping_at(position).lock(position - source_.part_at(position).begin, n);
}

}  // namespace gemmart
