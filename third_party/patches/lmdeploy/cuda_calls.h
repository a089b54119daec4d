// The functions of the CUDA runtime that the patches call. TurboMind's library imports them all; they
// are looked up through it and never linked, so that its runtime is the one that answers.
#pragma once

#include <cstddef>

namespace sagec::tm {

// They return a cudaError_t, 0 where all is well. Null where the runtime has no such function.
struct CudaCalls {
    int (*memcpy_async)(void *to, const void *from, std::size_t num_bytes, int kind, void *stream);
    int (*stream_create)(void **stream, unsigned flags);
    int (*stream_destroy)(void *stream);
    int (*stream_synchronize)(void *stream);
    int (*host_alloc)(void **memory, std::size_t num_bytes, unsigned flags);
    int (*host_free)(void *memory);
    int (*get_device)(int *device);
    int (*get_last_error)();
    int (*event_create)(void **event);
    int (*event_record)(void *event, void *stream);
    int (*event_elapsed)(float *milliseconds, void *begin, void *end);

    bool can_copy() const;
    bool can_time() const;
};

constexpr int kHostToDevice = 1, kDeviceToHost = 2;
constexpr unsigned kNonBlocking = 1;

const CudaCalls &cuda(); // once TurboMind is loaded

} // namespace sagec::tm
