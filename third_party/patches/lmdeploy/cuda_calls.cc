#include "cuda_calls.h"

#include "library.h"

namespace sagec::tm {

namespace {

template <class Function> void look_up(Function &function, const char *name) {
    function = reinterpret_cast<Function>(resolve(name));
}

CudaCalls look_up_all() {
    CudaCalls calls{};
    look_up(calls.memcpy_async, "cudaMemcpyAsync");
    look_up(calls.stream_create, "cudaStreamCreateWithFlags");
    look_up(calls.stream_destroy, "cudaStreamDestroy");
    look_up(calls.stream_synchronize, "cudaStreamSynchronize");
    look_up(calls.host_alloc, "cudaHostAlloc");
    look_up(calls.host_free, "cudaFreeHost");
    look_up(calls.get_device, "cudaGetDevice");
    look_up(calls.get_last_error, "cudaGetLastError");
    look_up(calls.event_create, "cudaEventCreate");
    look_up(calls.event_record, "cudaEventRecord");
    look_up(calls.event_elapsed, "cudaEventElapsedTime");
    return calls;
}

} // namespace

bool CudaCalls::can_copy() const {
    return memcpy_async && stream_create && stream_destroy && stream_synchronize && host_alloc && host_free &&
           get_last_error;
}

bool CudaCalls::can_time() const {
    return get_device && get_last_error && event_create && event_record && event_elapsed;
}

const CudaCalls &cuda() {
    static const CudaCalls calls = look_up_all();
    return calls;
}

} // namespace sagec::tm
