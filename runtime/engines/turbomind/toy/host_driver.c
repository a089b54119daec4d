/* libcuda.so.1 for a machine without a GPU. TurboMind imports these for its own communicator over CUDA's
 * virtual memory, which the host does not have: nothing here is reached unless that is asked for.
 */
#include <stdio.h>

enum { NOT_SUPPORTED = 801 };

#define UNSUPPORTED(name)                                                                                    \
    int name(void) {                                                                                         \
        fputs("sagec: TurboMind called " #name ", which the host's stand-in for CUDA does not have; use "    \
              "communicator=nccl\n",                                                                         \
              stderr);                                                                                       \
        return NOT_SUPPORTED;                                                                                \
    }

UNSUPPORTED(cuDeviceGetAttribute)
UNSUPPORTED(cuMemAddressFree)
UNSUPPORTED(cuMemAddressReserve)
UNSUPPORTED(cuMemCreate)
UNSUPPORTED(cuMemGetAllocationGranularity)
UNSUPPORTED(cuMemMap)
UNSUPPORTED(cuMemRelease)
UNSUPPORTED(cuMemRetainAllocationHandle)
UNSUPPORTED(cuMemSetAccess)
UNSUPPORTED(cuMemUnmap)
UNSUPPORTED(cuMulticastAddDevice)
UNSUPPORTED(cuMulticastBindMem)
UNSUPPORTED(cuMulticastCreate)
UNSUPPORTED(cuMulticastGetGranularity)
UNSUPPORTED(cuMulticastUnbind)

int cuGetErrorString(int error, const char **text) {
    (void)error;
    *text = "not possible on the host's stand-in for CUDA";
    return 0;
}
