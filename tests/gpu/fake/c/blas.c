// libcublas: products are counted with their sizes. build.py writes the rest; products among that
// are counted by name.
#include "fake.h"

#include <stdlib.h>

#include "cublas_v2.h"

typedef struct {
    cudaStream_t stream;
} Handle;
typedef cublasOperation_t Op;
typedef cudaDataType Type;

cublasStatus_t cublasCreate_v2(cublasHandle_t* made) {
    *made = (cublasHandle_t)calloc(1, sizeof(Handle));
    return 0;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    free(handle);
    return 0;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    ((Handle*)handle)->stream = stream;
    return 0;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t* mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return 0;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return 0;
}

// A product of a library's own: handles begin with their stream.
cublasStatus_t fake_product(void* handle, const char* name) {
    fake_launched(((Handle*)handle)->stream, PRODUCT, name);
    return 0;
}
static cublasStatus_t product(cublasHandle_t handle, int m, int n, int k, int many, int from,
                              int to) {
    char what[120];
    snprintf(what, sizeof what, "cublas %d products, %d x %d x %d, types %d to %d", many, m, n, k,
             from, to);
    return fake_product(handle, what);
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, Op ta, Op tb, int m, int n, int k,
                            const void* alpha, const void* a, Type of_a, int lda, const void* b,
                            Type of_b, int ldb, const void* beta, void* c, Type of_c, int ldc,
                            cublasComputeType_t in, cublasGemmAlgo_t how) {
    return product(handle, m, n, k, 1, of_a, of_c);
}
cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, Op ta, Op tb, int m, int n, int k,
                              const float* alpha, const float* a, int lda, const float* b, int ldb,
                              const float* beta, float* c, int ldc) {
    return product(handle, m, n, k, 1, CUDA_R_32F, CUDA_R_32F);
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, Op ta, Op tb, int m, int n, int k,
                                         const float* alpha, const float* a, int lda, long long sa,
                                         const float* b, int ldb, long long sb, const float* beta,
                                         float* c, int ldc, long long sc, int many) {
    return product(handle, m, n, k, many, CUDA_R_32F, CUDA_R_32F);
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, Op ta, Op tb, int m, int n, int k,
                                          const void* alpha, const void* a, Type of_a, int lda,
                                          long long sa, const void* b, Type of_b, int ldb,
                                          long long sb, const void* beta, void* c, Type of_c,
                                          int ldc, long long sc, int many, cublasComputeType_t in,
                                          cublasGemmAlgo_t how) {
    return product(handle, m, n, k, many, of_a, of_c);
}
