// Exceptions end at the module's border: functions of executor_abi.h and kernel_abi.h return what guarded() does.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "error.h"
#include "executor_abi.h"

namespace gemmart::gpu {

inline std::string& last_error() {
    static thread_local std::string text;
    return text;
}

// The status of body(), with the reason of a failure in last_error().
template <typename Body>
int32_t guarded(Body body) noexcept {
    const auto failed = [](int32_t status, const char* what) {
        try {
            last_error() = what;
        } catch (...) {
            last_error().clear();  // no memory for the reason
        }
        return status;
    };
    try {
        body();
        return GEMMART_OK;
    } catch (const OutOfMemory& e) {
        return failed(GEMMART_OUT_OF_MEMORY, e.what());
    } catch (const Cancelled& e) {
        return failed(GEMMART_CANCELLED, e.what());
    } catch (const UnsupportedError& e) {
        return failed(GEMMART_UNSUPPORTED, e.what());
    } catch (const std::invalid_argument& e) {
        return failed(GEMMART_INVALID, e.what());
    } catch (const std::bad_alloc&) {
        return failed(GEMMART_OUT_OF_MEMORY, "no memory of the machine's own is left");
    } catch (const std::exception& e) {
        return failed(GEMMART_DEVICE_ERROR, e.what());
    } catch (...) {
        return failed(GEMMART_DEVICE_ERROR, "an unknown error");
    }
}

}  // namespace gemmart::gpu
