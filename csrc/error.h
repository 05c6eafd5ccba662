// The only exceptions the core throws; module.cpp maps each to its Python class (errors.py).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace gemmart {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct FormatError : Error {  // the file is not what it says it is
    using Error::Error;
};
struct TruncatedError : FormatError {  // the file ends before what it announces
    using FormatError::FormatError;
};
struct UnsupportedError : Error {  // a sound file that asks for something this build does not do
    using Error::Error;
};
struct FileChanged : Error {  // the file was changed after it was opened
    using Error::Error;
};
struct NumericError : Error {  // a weight is NaN or infinite
    using Error::Error;
};
struct DeviceError : Error {  // a device or instruction set cannot be used
    using Error::Error;
};
struct Cancelled : Error {  // by whoever asked for it
    using Error::Error;
};
struct OutOfMemory : Error {
    using Error::Error;
};
struct NotFound : Error {  // no such file
    using Error::Error;
};
// A caller's mistake is std::invalid_argument.

template <typename... Parts>
std::string message(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// check<FormatError>(n <= limit, path, ": n_kv is ", n, ", limit ", limit);
template <typename E, typename... Parts>
inline void check(bool good, const Parts&... parts) {
    if (!good) throw E(message(parts...));
}

}  // namespace gemmart
