#include "pdiff/c_api.h"

#include <exception>
#include <new>
#include <string>

#include "pdiff/device.h"
#include "pdiff/error.h"
#include "pdiff/isa.h"

namespace {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

pdiff_status fail(pdiff_status status, const char* message) noexcept {
  try {
    last_error() = message;
  } catch (...) {  // no memory even for the message: the status still says it
  }
  return status;
}

// Run `body` and turn what it throws into a status.
template <typename Body>
pdiff_status guarded(Body&& body) noexcept {
  try {
    body();
    return PDIFF_OK;
  } catch (const pdiff::Error& error) {
    return fail(PDIFF_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return fail(PDIFF_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(PDIFF_INTERNAL_ERROR, error.what());
  } catch (...) {
    return fail(PDIFF_INTERNAL_ERROR, "unknown exception");
  }
}

}  // namespace

extern "C" {

const char* pdiff_version(void) { return PDIFF_VERSION; }

const char* pdiff_last_error(void) { return last_error().c_str(); }

pdiff_status pdiff_isa_name(const char** name) {
  return guarded([&] {
    PDIFF_CHECK(name != nullptr, "name: expected a pointer, got NULL");
    *name = pdiff::isa_name(pdiff::selected_isa());
  });
}

pdiff_status pdiff_select_isa(const char* name) {
  return guarded([&] { pdiff::select_isa(name); });
}

int pdiff_built_with_cuda(void) { return pdiff::built_with_cuda() ? 1 : 0; }

int pdiff_cuda_device_count(void) { return pdiff::cuda_device_count(); }

}  // extern "C"
