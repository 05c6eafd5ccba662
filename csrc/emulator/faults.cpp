#include "emulator/faults.h"

#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>

#include <iterator>
#include <sstream>

namespace gemmart::emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
struct sigaction before[std::size(kSignals)];
bool (*is_in_kernel)();
void (*fail_kernel)(const std::string& reason);

const void* code_of(void* context) {
    const mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    return reinterpret_cast<const void*>(machine.gregs[REG_RIP]);
#else
    return reinterpret_cast<const void*>(machine.pc);
#endif
}

void on_signal(int signal, siginfo_t* info, void* context) {
    if (!is_in_kernel()) {  // what it was before; the instruction is tried again
        for (size_t i = 0; i < std::size(kSignals); i++) {
            if (kSignals[i] == signal) sigaction(signal, &before[i], nullptr);
        }
        return;
    }
    std::string reason = "touches " + describe_address(info->si_addr);
    if (signal == SIGFPE) reason = "divides by zero";
    if (signal == SIGILL) reason = "uses an address that is not aligned, or an index outside of an array";
    fail_kernel(reason + ", " + place_of(code_of(context)));
}

}  // namespace

void catch_faults(bool (*in_kernel)(), void (*fail)(const std::string& reason)) {
    is_in_kernel = in_kernel;
    fail_kernel = fail;
    // A stack for the handler, since a fibre's own may be what has ended.
    alignas(16) static thread_local unsigned char stack[64 * 1024];
    stack_t found{};
    sigaltstack(nullptr, &found);
    if (found.ss_flags & SS_DISABLE) {
        const stack_t mine{stack, 0, sizeof stack};
        sigaltstack(&mine, nullptr);
    }
    for (size_t i = 0; i < std::size(kSignals); i++) {
        struct sigaction now{}, old{};
        now.sa_sigaction = on_signal;
        now.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler is left by a jump
        sigaction(kSignals[i], &now, &old);
        if (old.sa_sigaction != on_signal) before[i] = old;
    }
}

std::string place_of(const void* code) {
    Dl_info found{};
    std::ostringstream out;
    if (dladdr(code, &found) && found.dli_fname) {
        out << found.dli_fname << "+0x" << std::hex
            << static_cast<const char*>(code) - static_cast<const char*>(found.dli_fbase);
    } else {
        out << code;
    }
    return out.str();
}

}  // namespace gemmart::emulator
