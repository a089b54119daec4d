/* libcublas.so.12 for a machine without a GPU: a handle is made and given back, and no matrix is ever
 * multiplied, for the toy model takes the place of all that would.
 */
#include <stdio.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 15 };

int cublasCreate_v2(void **handle) {
    static char made;
    *handle = &made;
    return SUCCESS;
}

int cublasDestroy_v2(void *handle) {
    (void)handle;
    return SUCCESS;
}

int cublasSetStream_v2(void *handle, void *stream) {
    (void)handle, (void)stream;
    return SUCCESS;
}

int cublasSetWorkspace_v2(void *handle, void *workspace, unsigned long bytes) {
    (void)handle, (void)workspace, (void)bytes;
    return SUCCESS;
}

int cublasGetMathMode(void *handle, int *mode) {
    (void)handle;
    *mode = 0;
    return SUCCESS;
}

int cublasGemmEx(void) {
    fputs("sagec: TurboMind called cublasGemmEx, which the host's stand-in for CUDA does not have\n", stderr);
    return NOT_SUPPORTED;
}
