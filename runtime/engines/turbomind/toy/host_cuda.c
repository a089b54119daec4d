/* libcudart.so.12 for a machine without a GPU: what TurboMind's library imports of the CUDA runtime, on
 * host memory. A stream is a handle and nothing runs behind anybody's back: a copy is done when its call
 * returns, so waiting for a stream is waiting for nothing. Events keep the time at which they were
 * recorded. Kernels are not run: the toy model takes the place of those whose result matters, and the
 * others (sampling state, transposes for kernels that are not run either) are skipped and counted.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_HANDLE = 400, NOT_SUPPORTED = 801 };

#define NUM_DEVICES 8
#define DEVICE_BYTES ((size_t)64 << 30)
#define ALIGNMENT 256

static _Thread_local int current_device;

static int unsupported(const char *name) {
    fprintf(stderr, "sagec: TurboMind called %s, which the host's stand-in for CUDA does not have\n", name);
    return NOT_SUPPORTED;
}

/* ---- devices ------------------------------------------------------------------------------------ */

int cudaGetDevice(int *device) {
    *device = current_device;
    return SUCCESS;
}

int cudaSetDevice(int device) {
    if (device < 0 || device >= NUM_DEVICES)
        return INVALID_VALUE;
    current_device = device;
    return SUCCESS;
}

int cudaGetDeviceCount(int *count) {
    *count = NUM_DEVICES;
    return SUCCESS;
}

/* Those that TurboMind asks for, as of an A100; the rest are 1. */
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 8: /* shared memory of a block, bytes */
        *value = 49152;
        break;
    case 10: /* warp */
        *value = 32;
        break;
    case 16: /* multiprocessors */
        *value = 108;
        break;
    case 39: /* threads of a multiprocessor */
        *value = 2048;
        break;
    case 75: /* compute capability 8.0 */
        *value = 8;
        break;
    case 76:
        *value = 0;
        break;
    case 81: /* shared memory of a multiprocessor, and of a block that asks for more */
    case 97:
        *value = 166912;
        break;
    default:
        *value = 1;
    }
    return SUCCESS;
}

/* cudaDeviceProp of CUDA 12: 1032 bytes, of which these are looked at. */
int cudaGetDeviceProperties_v2(char *properties, int device) {
    static const struct {
        int offset, value;
    } numbers[] = {
        {304, 65536}, {308, 32},    {320, 1024}, {360, 8},     {364, 0},
        {388, 108},   {616, 40960}, {624, 2048}, {648, 65536}, {712, 32},
    };
    static const struct {
        int offset;
        size_t value;
    } sizes[] = {{288, DEVICE_BYTES}, {296, 49152}, {640, 167936}, {696, 166912}};
    (void)device;
    memset(properties, 0, 1032);
    strcpy(properties, "host");
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; ++i)
        memcpy(properties + numbers[i].offset, &numbers[i].value, sizeof(int));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i)
        memcpy(properties + sizes[i].offset, &sizes[i].value, sizeof(size_t));
    return SUCCESS;
}

int cudaDeviceSynchronize(void) { return SUCCESS; }

int cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *free_bytes = *total_bytes = DEVICE_BYTES;
    return SUCCESS;
}

int cudaGetDriverEntryPoint(const char *symbol, void **function, unsigned long long flags, int *status) {
    (void)symbol, (void)flags;
    *function = NULL;
    if (status)
        *status = 1; /* no such symbol */
    return unsupported("cudaGetDriverEntryPoint");
}

/* ---- memory --------------------------------------------------------------------------------------- */

/* Zeroed, so that KV which nobody wrote is the same everywhere; calloc leaves large pages untouched.
 * What calloc gave is kept in front of the aligned block. */
int cudaMalloc(void **block, size_t bytes) {
    char *raw = calloc(1, bytes + ALIGNMENT + sizeof(void *));
    if (!raw)
        return OUT_OF_MEMORY;
    uintptr_t aligned = ((uintptr_t)raw + sizeof(void *) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    ((void **)aligned)[-1] = raw;
    *block = (void *)aligned;
    return SUCCESS;
}

int cudaFree(void *block) {
    if (block)
        free(((void **)block)[-1]);
    return SUCCESS;
}

int cudaMallocAsync(void **block, size_t bytes, void *stream) {
    (void)stream;
    return cudaMalloc(block, bytes);
}

int cudaMallocFromPoolAsync(void **block, size_t bytes, void *pool, void *stream) {
    (void)pool, (void)stream;
    return cudaMalloc(block, bytes);
}

int cudaHostAlloc(void **block, size_t bytes, unsigned flags) {
    (void)flags;
    return cudaMalloc(block, bytes);
}

int cudaMallocHost(void **block, size_t bytes) { return cudaMalloc(block, bytes); }

int cudaFreeAsync(void *block, void *stream) {
    (void)stream;
    return cudaFree(block);
}

int cudaFreeHost(void *block) { return cudaFree(block); }

int cudaMemcpy(void *target, const void *source, size_t bytes, int kind) {
    (void)kind;
    memmove(target, source, bytes);
    return SUCCESS;
}

int cudaMemcpyAsync(void *target, const void *source, size_t bytes, int kind, void *stream) {
    (void)stream;
    return cudaMemcpy(target, source, bytes, kind);
}

int cudaMemcpyPeer(void *target, int target_device, const void *source, int source_device, size_t bytes) {
    (void)target_device, (void)source_device;
    return cudaMemcpy(target, source, bytes, 0);
}

int cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch,
                      size_t width, size_t height, int kind, void *stream) {
    (void)kind, (void)stream;
    for (size_t row = 0; row < height; ++row)
        memmove((char *)target + row * target_pitch, (const char *)source + row * source_pitch, width);
    return SUCCESS;
}

int cudaMemsetAsync(void *block, int value, size_t bytes, void *stream) {
    (void)stream;
    memset(block, value, bytes);
    return SUCCESS;
}

struct pointer_attributes {
    int type, device;
    void *device_pointer, *host_pointer;
};

int cudaPointerGetAttributes(struct pointer_attributes *attributes, const void *pointer) {
    *attributes = (struct pointer_attributes){2 /* device memory */, 0, (void *)pointer, (void *)pointer};
    return SUCCESS;
}

/* ---- streams, events and pools: handles ------------------------------------------------------------ */

static int new_handle(void **handle, size_t bytes) {
    *handle = calloc(1, bytes);
    return *handle ? SUCCESS : OUT_OF_MEMORY;
}

int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    (void)flags;
    return new_handle(stream, 1);
}

int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    (void)priority;
    return cudaStreamCreateWithFlags(stream, flags);
}

int cudaStreamDestroy(void *stream) {
    free(stream);
    return SUCCESS;
}

int cudaStreamSynchronize(void *stream) {
    (void)stream;
    return SUCCESS;
}

int cudaStreamQuery(void *stream) {
    (void)stream;
    return SUCCESS;
}

int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) {
    (void)stream, (void)event, (void)flags;
    return SUCCESS;
}

int cudaEventCreateWithFlags(struct timespec **event, unsigned flags) {
    (void)flags;
    return new_handle((void **)event, sizeof **event);
}

int cudaEventCreate(struct timespec **event) { return cudaEventCreateWithFlags(event, 0); }

int cudaEventDestroy(struct timespec *event) {
    free(event);
    return SUCCESS;
}

int cudaEventRecord(struct timespec *event, void *stream) {
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, event);
    return SUCCESS;
}

int cudaEventSynchronize(struct timespec *event) {
    (void)event;
    return SUCCESS;
}

int cudaEventQuery(struct timespec *event) {
    (void)event;
    return SUCCESS;
}

int cudaEventElapsedTime(float *milliseconds, const struct timespec *begin, const struct timespec *end) {
    if (!begin->tv_sec || !end->tv_sec) /* never recorded */
        return INVALID_HANDLE;
    *milliseconds = (end->tv_sec - begin->tv_sec) * 1e3f + (end->tv_nsec - begin->tv_nsec) * 1e-6f;
    return SUCCESS;
}

int cudaMemPoolCreate(void **pool, const void *properties) {
    (void)properties;
    return new_handle(pool, 1);
}

int cudaDeviceGetDefaultMemPool(void **pool, int device) {
    static char pools[NUM_DEVICES];
    *pool = &pools[device];
    return SUCCESS;
}

int cudaMemPoolDestroy(void *pool) {
    free(pool);
    return SUCCESS;
}

int cudaMemPoolSetAttribute(void *pool, int attribute, void *value) {
    (void)pool, (void)attribute, (void)value;
    return SUCCESS;
}

int cudaMemPoolTrimTo(void *pool, size_t bytes) {
    (void)pool, (void)bytes;
    return SUCCESS;
}

/* ---- kernels --------------------------------------------------------------------------------------- */

struct dim3 {
    unsigned x, y, z;
};

int cudaLaunchKernel(const void *function, struct dim3 grid, struct dim3 block, void **arguments,
                     size_t shared_bytes, void *stream) {
    (void)function, (void)grid, (void)block, (void)arguments, (void)shared_bytes, (void)stream;
    return SUCCESS;
}

int cudaLaunchKernelExC(const void *config, const void *function, void **arguments) {
    (void)config, (void)function, (void)arguments;
    return SUCCESS;
}

/* The head of cudaFuncAttributes: bytes of shared, constant and local memory, then threads a block. */
struct function_attributes {
    size_t shared_bytes, constant_bytes, local_bytes;
    int max_threads, num_registers, ptx_version, binary_version;
};

int cudaFuncGetAttributes(struct function_attributes *attributes, const void *function) {
    (void)function;
    *attributes = (struct function_attributes){.max_threads = 1024, .ptx_version = 80, .binary_version = 80};
    return SUCCESS;
}

int cudaFuncSetAttribute(const void *function, int attribute, int value) {
    (void)function, (void)attribute, (void)value;
    return SUCCESS;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                           size_t shared_bytes, unsigned flags) {
    (void)function, (void)threads, (void)shared_bytes, (void)flags;
    *blocks = 2;
    return SUCCESS;
}

int cudaOccupancyMaxActiveClusters(int *clusters, const void *function, const void *config) {
    (void)function, (void)config;
    *clusters = 2;
    return SUCCESS;
}

int cudaOccupancyMaxPotentialClusterSize(int *clusters, const void *function, const void *config) {
    return cudaOccupancyMaxActiveClusters(clusters, function, config);
}

/* What the compiler of CUDA code calls when a library is loaded. */
void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    (void)binary;
    return &handle;
}

void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }

void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit,
                            void *thread, void *block, void *block_dim, void *grid_dim, int *warp) {
    (void)handle, (void)host, (void)device, (void)name, (void)limit;
    (void)thread, (void)block, (void)block_dim, (void)grid_dim, (void)warp;
}

void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t bytes,
                       int constant, int global) {
    (void)handle, (void)host, (void)device, (void)name;
    (void)external, (void)bytes, (void)constant, (void)global;
}

/* A launch, written as kernel<<<...>>>(), skipped as a whole where this does not return 0. */
unsigned __cudaPushCallConfiguration(struct dim3 grid, struct dim3 block, size_t shared_bytes, void *stream) {
    (void)grid, (void)block, (void)shared_bytes, (void)stream;
    return 1;
}

int __cudaPopCallConfiguration(struct dim3 *grid, struct dim3 *block, size_t *shared_bytes, void **stream) {
    (void)grid, (void)block, (void)shared_bytes, (void)stream;
    return unsupported("__cudaPopCallConfiguration");
}

/* ---- errors ---------------------------------------------------------------------------------------- */

int cudaGetLastError(void) { return SUCCESS; }
int cudaPeekAtLastError(void) { return SUCCESS; }

const char *cudaGetErrorString(int error) {
    return error == SUCCESS ? "no error" : "not possible on the host's stand-in for CUDA";
}

const char *cudaGetErrorName(int error) { return error == SUCCESS ? "cudaSuccess" : "cudaErrorNotSupported"; }
