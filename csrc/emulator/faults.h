// A kernel that touches memory that is not there, divides by zero, or does what -fsanitize=alignment,bounds traps
// (-fsanitize-undefined-trap-on-error), ends with an error instead of the process.
#pragma once

#include <string>

namespace gemmart::emulator {

// Signals of this OS thread go to `fail` while `in_kernel` says so, as before otherwise.
void catch_faults(bool (*in_kernel)(), void (*fail)(const std::string& reason));

// "module.so+0x1234", as addr2line -e wants it.
std::string place_of(const void* code);

// What lies at or beside an address: "4 bytes behind an allocation of 400" (runtime.cpp).
std::string describe_address(const void* address);

}  // namespace gemmart::emulator
