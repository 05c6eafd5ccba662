#include "mapping.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <mutex>

#include "error.h"

namespace gemmart {
namespace {

// Plain numbers, since a signal handler reads them while other threads map and unmap. The handler runs in a thread that
// reads a mapping, which therefore lives.
struct Place {
    std::atomic<uintptr_t> begin{0}, end{0};  // 0: free
    std::atomic<bool> lost{false};
};
constexpr int kPlaces = 1024;
Place places[kPlaces];
std::mutex places_mutex;

struct sigaction previous;

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// SIGBUS: the system cannot bring a page of a file. In a mapping of ours the rest becomes zeros and the reading goes
// on; any other is for whoever was asked before.
void on_bus_error(int signal, siginfo_t* info, void* context) {
    const int error = errno;
    const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
    for (Place& place : places) {
        if (info->si_code != BUS_ADRERR) break;  // sent by a program, or broken memory
        const uintptr_t end = place.end.load();
        if (at < place.begin.load() || at >= end) continue;
        const uintptr_t page = at / page_size() * page_size();
        place.lost.store(true);
        void* zeros = mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        errno = error;
        if (zeros != MAP_FAILED) return;
    }
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else {
        struct sigaction plain = {};
        plain.sa_handler = SIG_DFL;
        sigaction(SIGBUS, &plain, nullptr);  // the read that failed is tried again and ends the process
    }
}

void install_handler() {
    struct sigaction ours = {};
    ours.sa_sigaction = on_bus_error;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, &previous);
}

int take_place(uintptr_t begin, uintptr_t end) {
    std::lock_guard lock(places_mutex);
    for (int i = 0; i < kPlaces; ++i) {
        if (places[i].end.load()) continue;
        places[i].lost.store(false);
        places[i].begin.store(begin);
        places[i].end.store(end);
        return i;
    }
    throw OutOfMemory(message("more than ", kPlaces, " mapped models"));
}

void advise(const std::byte* data, size_t n, int advice) {
    const size_t skew = reinterpret_cast<uintptr_t>(data) % page_size();
    madvise(const_cast<std::byte*>(data) - skew, n + skew, advice);
}

}  // namespace

Mapping::Mapping(int fd, uint64_t offset, size_t n_bytes) : n_bytes_(n_bytes) {
    static std::once_flag installed;
    std::call_once(installed, install_handler);
    const size_t skew = offset % page_size();
    void* at = mmap(nullptr, skew + n_bytes, PROT_READ, MAP_SHARED, fd, static_cast<off_t>(offset - skew));
    check<OutOfMemory>(at != MAP_FAILED, "a file of ", n_bytes, " bytes cannot be mapped: ", std::strerror(errno));
    pages_ = static_cast<const std::byte*>(at);
    data_ = pages_ + skew;
    try {
        place_ = take_place(reinterpret_cast<uintptr_t>(pages_), reinterpret_cast<uintptr_t>(data_ + n_bytes));
    } catch (...) {
        munmap(at, skew + n_bytes);
        throw;
    }
}

Mapping::~Mapping() {
    places[place_].end.store(0);
    munmap(const_cast<std::byte*>(pages_), static_cast<size_t>(data_ - pages_) + n_bytes_);
}

bool Mapping::lost() const { return places[place_].lost.load(); }

void Mapping::lock(size_t offset, size_t n) const { lock_memory(data_ + offset, n); }

void Mapping::prefetch(size_t offset, size_t n) const { advise(data_ + offset, n, MADV_WILLNEED); }
void Mapping::forget(size_t offset, size_t n) const { advise(data_ + offset, n, MADV_DONTNEED); }

void lock_memory(const std::byte* data, size_t n) {
    const size_t skew = reinterpret_cast<uintptr_t>(data) % page_size();
    if (mlock(data - skew, n + skew) == 0) return;
    const int error = errno;
    struct rlimit limit = {};
    getrlimit(RLIMIT_MEMLOCK, &limit);
    throw OutOfMemory(message("mlock: the system does not lock the weights in memory (", std::strerror(error),
                              "); this process may lock ", limit.rlim_cur >> 10,
                              " KiB. Raise the limit (ulimit -l unlimited as root, memlock in "
                              "/etc/security/limits.conf, LimitMEMLOCK= of a service, --ulimit memlock=-1 of a "
                              "container) or do without mlock"));
}

}  // namespace gemmart
