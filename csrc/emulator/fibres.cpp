#include "emulator/fibres.h"

#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <vector>

#include "emulator/faults.h"

namespace gemmart::emulator {

Place* place = nullptr;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kLanes = 32;  // of a group; the order of threads changes within
constexpr size_t kPage = 4096;
constexpr size_t kMostShared = 256 * 1024;

enum class State { kReady, kAtBarrier, kMeeting, kEnded };

struct Copy {
    void* to;
    const void* from;
    int group;
};

// Place comes first: `place` points to the running fibre.
struct Fibre : Place {
    int id = 0;  // in the block
    State state = State::kEnded;
    const char* meeting = nullptr;
    const void* code = nullptr;  // where it waits
    bool waited_for_previous = false;
    int n_committed = 0;
    std::vector<Copy> copies;
    jmp_buf registers;
};

struct Meeting {
    int n_arrived = 0;
    const char* kind = nullptr;
    int turn = 0;  // two sets of slots: one is read while the next meeting fills the other
    alignas(64) unsigned char slots[2][64][kSlotBytes];
};

// A mapping between two pages that nobody may touch.
class Guarded {
  public:
    explicit Guarded(size_t bytes) : bytes_(bytes) {
        base_ = static_cast<unsigned char*>(mmap(nullptr, bytes + 2 * kPage, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        mprotect(base_, kPage, PROT_NONE);
        mprotect(base_ + kPage + bytes, kPage, PROT_NONE);
    }
    ~Guarded() { munmap(base_, bytes_ + 2 * kPage); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    unsigned char* data() const { return base_ + kPage; }
    unsigned char* end() const { return data() + bytes_; }

  private:
    unsigned char* base_;
    size_t bytes_;
};

// splitmix64
struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
};

thread_local bool running = false;  // this OS thread is in a kernel

// What it takes to run blocks; kept for the next kernels.
class Processor {
  public:
    std::string run(dim3 grid_size, dim3 block_size, size_t shared_bytes, const std::function<void()>& kernel);

    void sync_threads(const void* code) {
        me().state = State::kAtBarrier;
        me().code = code;
        if (++n_at_barrier_ == n_threads_) {
            n_at_barrier_ = 0;
            make_ready(0, n_threads_);
        }
        leave();
    }
    const unsigned char* meet(int n_lanes, const char* kind, const void* mine, size_t bytes,
                              void (*combine)(unsigned char*), const void* code);
    void end_thread();
    [[noreturn]] void fail(const std::string& reason) {
        failure_ = reason + " (" + where() + ")";
        abandon();
    }

    Fibre& me() { return *static_cast<Fibre*>(place); }
    unsigned char* shared() { return shared_; }
    bool copies_late() const { return copies_late_; }
    const std::function<void()>& kernel() const { return *kernel_; }
    jmp_buf& caller() { return caller_; }

  private:
    void run_block();
    void prepare(int n_threads);
    void make_ready(int first, int n);
    void leave();
    std::string where();
    std::string who_waits();
    [[noreturn]] void abandon() {
        broken_ = true;
        _longjmp(caller_, 1);
    }

    std::vector<std::unique_ptr<Fibre>> fibres_;
    std::vector<std::unique_ptr<Guarded>> stacks_;
    std::vector<Meeting> meetings_[2];  // of groups of 32 and of 64 lanes
    Guarded shared_room_{kMostShared};
    unsigned char* shared_ = nullptr;
    size_t shared_bytes_ = 0;

    const std::function<void()>* kernel_ = nullptr;
    int n_threads_ = 0, n_ended_ = 0, n_at_barrier_ = 0;
    std::vector<int> ready_;  // a ring
    size_t first_ready_ = 0, n_ready_ = 0;
    bool newest_first_ = false, copies_late_ = false;
    Random random_{};
    uint64_t n_launches_ = 0;

    jmp_buf caller_;
    bool broken_ = false;
    std::string failure_;
};

Processor* processor = nullptr;

// makecontext passes no pointers: the new fibre finds itself in `place`.
ucontext_t start_context, made_context;

void fibre_main() {
    Fibre& me = processor->me();
    if (_setjmp(me.registers) == 0) swapcontext(&made_context, &start_context);
    for (;;) {
        processor->kernel()();
        processor->end_thread();
    }
}

void Processor::prepare(int n_threads) {
    if (broken_) {  // stacks of threads that never ended begin anew
        fibres_.clear();
        broken_ = false;
    }
    while (static_cast<int>(stacks_.size()) < n_threads) stacks_.push_back(std::make_unique<Guarded>(kStackBytes));
    while (static_cast<int>(fibres_.size()) < n_threads) {
        const size_t id = fibres_.size();
        fibres_.push_back(std::make_unique<Fibre>());
        fibres_[id]->id = static_cast<int>(id);
        getcontext(&made_context);
        made_context.uc_stack.ss_sp = stacks_[id]->data();
        // Stacks begin at different places of a page, or all their ends would share a few lines of the cache.
        made_context.uc_stack.ss_size = kStackBytes - id * 320 % kPage / 64 * 64;
        made_context.uc_link = nullptr;
        makecontext(&made_context, fibre_main, 0);
        place = fibres_[id].get();
        swapcontext(&start_context, &made_context);
    }
    for (auto& meetings : meetings_) {
        if (static_cast<int>(meetings.size()) * kLanes < n_threads) meetings.resize((n_threads + kLanes - 1) / kLanes);
    }
    ready_.resize(static_cast<size_t>(n_threads));
}

// Groups from a random one onwards, in each the lanes in an order of their own.
void Processor::make_ready(int first, int n) {
    const int n_groups = (n + kLanes - 1) / kLanes;
    const uint64_t order = random_.next();
    const int start = static_cast<int>((order >> 8) % static_cast<uint64_t>(n_groups));
    for (int i = 0; i < n_groups; i++) {
        int group = (start + i) % n_groups;
        if (order >> 7 & 1) group = n_groups - 1 - group;
        for (int j = 0; j < kLanes; j++) {
            const int thread = first + group * kLanes + (j ^ static_cast<int>(order & (kLanes - 1)));
            if (thread >= first + n) continue;
            fibres_[static_cast<size_t>(thread)]->state = State::kReady;
            ready_[(first_ready_ + n_ready_++) % ready_.size()] = thread;
        }
    }
}

// Switches to a thread that can go on; returns when this one can.
void Processor::leave() {
    Fibre& from = me();
    if (n_ready_ == 0) {
        fail(who_waits());
    }
    n_ready_--;
    size_t next = first_ready_;
    if (newest_first_) {
        next = (first_ready_ + n_ready_) % ready_.size();
    } else {
        first_ready_ = (first_ready_ + 1) % ready_.size();
    }
    Fibre& to = *fibres_[static_cast<size_t>(ready_[next])];
    if (&to == &from) return;
    if (_setjmp(from.registers) == 0) {
        place = &to;
        _longjmp(to.registers, 1);
    }
}

const unsigned char* Processor::meet(int n_lanes, const char* kind, const void* mine, size_t bytes,
                                     void (*combine)(unsigned char*), const void* code) {
    Fibre& fibre = me();
    const int first = fibre.id / n_lanes * n_lanes;
    if (first + n_lanes > n_threads_) fail("a group of lanes is not complete, in " + std::string(kind));
    Meeting& meeting = meetings_[n_lanes == 64][static_cast<size_t>(fibre.id / n_lanes)];
    if (meeting.n_arrived == 0) meeting.kind = kind;
    if (strcmp(meeting.kind, kind) != 0) {
        fail(std::string("lanes of a group meet in ") + meeting.kind + " and in " + kind);
    }
    unsigned char (*slots)[kSlotBytes] = meeting.slots[meeting.turn];
    memcpy(slots[fibre.id - first], mine, bytes);
    fibre.state = State::kMeeting;
    fibre.meeting = kind;
    fibre.code = code;
    if (++meeting.n_arrived == n_lanes) {
        meeting.n_arrived = 0;
        meeting.turn ^= 1;
        if (combine) combine(slots[0]);
        make_ready(first, n_lanes);
    }
    leave();
    return slots[0];
}

void Processor::end_thread() {
    Fibre& fibre = me();
    fibre.state = State::kEnded;
    fibre.copies.clear();
    if (!fibre.waited_for_previous) fail("a thread ended without wait_for_previous()");
    if (++n_ended_ == n_threads_) {
        if (_setjmp(fibre.registers) == 0) _longjmp(caller_, 1);
    } else {
        leave();
    }
}

std::string Processor::where() {
    const Fibre& fibre = me();
    std::ostringstream out;
    out << "thread " << fibre.thread.x << "," << fibre.thread.y << "," << fibre.thread.z << " of block "
        << fibre.block.x << "," << fibre.block.y << "," << fibre.block.z;
    return out.str();
}

std::string Processor::who_waits() {
    int at_barrier = 0, meeting = 0, ended = 0;
    const Fibre *one_at_barrier = nullptr, *one_meeting = nullptr;
    for (int i = 0; i < n_threads_; i++) {
        const Fibre& fibre = *fibres_[static_cast<size_t>(i)];
        if (fibre.state == State::kEnded) ended++;
        if (fibre.state == State::kAtBarrier && at_barrier++ == 0) one_at_barrier = &fibre;
        if (fibre.state == State::kMeeting && meeting++ == 0) one_meeting = &fibre;
    }
    std::ostringstream out;
    out << "threads wait for others that never come: of " << n_threads_ << ", " << ended << " ended";
    if (at_barrier) out << ", " << at_barrier << " are in __syncthreads (" << place_of(one_at_barrier->code) << ")";
    if (meeting) {
        out << ", " << meeting << " are in " << one_meeting->meeting << " (" << place_of(one_meeting->code) << ")";
    }
    return out.str();
}

void Processor::run_block() {
    n_ended_ = n_at_barrier_ = 0;
    first_ready_ = n_ready_ = 0;
    for (auto& meetings : meetings_) {
        for (Meeting& meeting : meetings) meeting.n_arrived = 0;
    }
    const uint64_t order = random_.next();
    newest_first_ = order & 1;
    copies_late_ = order & 2;
    memset(shared_, 0xff, shared_bytes_);  // NaN, where nobody wrote
    make_ready(0, n_threads_);
    if (_setjmp(caller_) == 0) {
        running = true;
        Fibre& first = *fibres_[static_cast<size_t>(ready_[0])];
        first_ready_ = ready_.size() == 1 ? 0 : 1;
        n_ready_--;
        place = &first;
        _longjmp(first.registers, 1);
    }
    place = nullptr;
    running = false;
}

std::string Processor::run(dim3 grid_size, dim3 block_size, size_t shared_bytes, const std::function<void()>& kernel) {
    const char* seed = getenv("GEMMART_EMULATED_SEED");
    random_.state = (seed ? strtoull(seed, nullptr, 10) : 0) * 0xd1342543de82ef95u + n_launches_++;
    n_threads_ = static_cast<int>(block_size.x * block_size.y * block_size.z);
    prepare(n_threads_);
    // Ends at the guard page, as far as its alignment allows.
    shared_bytes_ = (shared_bytes + 127) / 128 * 128;
    shared_ = shared_room_.end() - shared_bytes_;
    kernel_ = &kernel;
    failure_.clear();
    for (unsigned z = 0; z < grid_size.z; z++) {
        for (unsigned y = 0; y < grid_size.y; y++) {
            for (unsigned x = 0; x < grid_size.x; x++) {
                for (int i = 0; i < n_threads_; i++) {
                    Fibre& fibre = *fibres_[static_cast<size_t>(i)];
                    const unsigned id = static_cast<unsigned>(i);
                    fibre.thread = {id % block_size.x, id / block_size.x % block_size.y,
                                    id / (block_size.x * block_size.y)};
                    fibre.block = {x, y, z};
                    fibre.block_size = block_size;
                    fibre.grid_size = grid_size;
                    fibre.waited_for_previous = false;
                    fibre.n_committed = 0;
                    fibre.copies.clear();
                }
                run_block();
                if (!failure_.empty()) return failure_;
            }
        }
    }
    return "";
}

}  // namespace

void sync_threads() { processor->sync_threads(__builtin_return_address(0)); }
unsigned char* shared_memory() { return processor->shared(); }
void fail(const std::string& reason) { processor->fail(reason); }
int lane_of(int n_lanes) { return processor->me().id % n_lanes; }

const unsigned char* meet(int n_lanes, const char* kind, const void* mine, size_t bytes,
                          void (*combine)(unsigned char*)) {
    return processor->meet(n_lanes, kind, mine, bytes, combine, __builtin_return_address(0));
}

void copy_later(void* to, const void* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) {
        fail("copy_async16 of an address that is not a multiple of 16");
    }
    if (!processor->copies_late()) {
        memcpy(to, from, 16);
        return;
    }
    Fibre& me = processor->me();
    me.copies.push_back({to, from, me.n_committed});
}

void commit_copies() { processor->me().n_committed++; }

void wait_copies(int n_pending) {
    Fibre& me = processor->me();
    size_t n_done = 0;
    for (; n_done < me.copies.size() && me.copies[n_done].group < me.n_committed - n_pending; n_done++) {
        memcpy(me.copies[n_done].to, me.copies[n_done].from, 16);
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(n_done));
}

void wait_for_previous() { processor->me().waited_for_previous = true; }

std::string run_grid(dim3 grid_size, dim3 block_size, size_t shared_bytes, const std::function<void()>& kernel) {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    static Processor only;
    processor = &only;
    catch_faults([] { return running; }, [](const std::string& reason) { processor->fail(reason); });
    return processor->run(grid_size, block_size, shared_bytes, kernel);
}

}  // namespace gemmart::emulator
