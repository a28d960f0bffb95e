// libcublasLt: products are counted, and refused where NVIDIA's documents, PyTorch's tests and
// vLLM's comments say that cuBLASLt refuses them. Written from these texts, never measured.
#include "fake.h"

#include <stdlib.h>
#include <string.h>

#include "cublasLt.h"

enum {
    ATTRIBUTES = 64
};
typedef struct {
    int64_t values[ATTRIBUTES];
} Description;
typedef struct {
    cudaDataType type;
    unsigned long long rows, columns;
} Layout;

size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t in,
                                        cudaDataType scale) {
    *made = (cublasLtMatmulDesc_t)calloc(1, sizeof(Description));
    return 0;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    free(description);
    return 0;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t which,
                                              const void* value, size_t size) {
    int64_t* kept = ((Description*)description)->values;
    if ((int)which < ATTRIBUTES) {
        kept[which] = 0;
        memcpy(kept + which, value, size < sizeof *kept ? size : sizeof *kept);
    }
    return 0;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) {
    *made = (cublasLtMatmulPreference_t)calloc(1, 512);
    return 0;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    free(preference);
    return 0;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* made, cudaDataType type,
                                          uint64_t rows, uint64_t columns, int64_t stride) {
    Layout* layout = calloc(1, sizeof *layout);
    *layout = (Layout){type, rows, columns};
    *made = (cublasLtMatrixLayout_t)layout;
    return 0;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    free(layout);
    return 0;
}

static int is_fp8(cudaDataType type) { return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2; }

// Why a product is refused, or null: of weights [depth, rows] and tokens [depth, count], columns
// first.
static const char* refusal(const Description* description, const Layout* w, const Layout* x) {
    int64_t of_w = description->values[CUBLASLT_MATMUL_DESC_A_SCALE_MODE];
    int64_t of_x = description->values[CUBLASLT_MATMUL_DESC_B_SCALE_MODE];
    const int vector = CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
    const int block = CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
    if (of_w == vector || of_w == block || of_x == vector || of_x == block) {
        if (fake_sm() / 10 != 9) return "scales of blocks are for sm_90 alone";
        if (of_w == vector && w->columns % 4) return "weights with scales by row: rows in fours";
        if (of_x == vector && x->columns % 4) return "tokens with scales by row: tokens in fours";
        if ((of_w == block || of_x == block) && (w->rows + 127) / 128 % 4)
            fake_illegal("scales of blocks are read at every round_up(depth / 128, 4)");
        return 0;
    }
    if (!is_fp8(w->type)) return 0;
    if (fake_sm() < 89) return "FP8 is for sm_89 and newer";
    return w->columns % 16 || w->rows % 16 ? "FP8: depth and rows in sixteens" : 0;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle,
                                              cublasLtMatmulDesc_t description,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int asked,
                                              cublasLtMatmulHeuristicResult_t* found, int* count) {
    const Layout *w = (const Layout*)a, *x = (const Layout*)b;
    const char* why = refusal((const Description*)description, w, x);
    memset(found, 0, sizeof *found);
    *count = !why;
    if (!why) return 0;
    fake_illegal("cublasLt refuses %llux%llu times %llux%llu: %s", w->rows, w->columns, x->rows,
                 x->columns, why);
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                              const void* alpha, const void* pa, cublasLtMatrixLayout_t a,
                              const void* pb, cublasLtMatrixLayout_t b, const void* beta,
                              const void* pc, cublasLtMatrixLayout_t c, void* pd,
                              cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* how, void* work,
                              size_t size, cudaStream_t stream) {
    const Layout *w = (const Layout*)a, *x = (const Layout*)b, *y = (const Layout*)d;
    char what[160];
    snprintf(what, sizeof what, "cublasLt %llux%llu times %llux%llu, types %d, %d to %d", w->rows,
             w->columns, x->rows, x->columns, w->type, x->type, y->type);
    fake_launched(stream, PRODUCT, what);
    return 0;
}
