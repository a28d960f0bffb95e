// What the parts of the played CUDA runtime share. A GPU here is host memory and a log: copies are
// done at once, kernels only counted, and what a GPU would refuse is refused.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "cuda_runtime_api.h"

// -- log.c ----------------------------------------------------------------------------------------
typedef enum {
    KERNEL,
    PRODUCT,
    GRAPH,
    MEMSET,
    TO_GPU,
    TO_GPU_PAGEABLE,
    FROM_GPU,
    FROM_GPU_PAGEABLE,
    ON_GPU,
    PEER,
    STREAM_SYNC,
    DEVICE_SYNC,
    EVENT_SYNC,
    RECORD,
    WAIT,
    WAIT_WORD,
    WRITE_WORD,
    ALLOCATE,
    FREE,
    PIN,
    KINDS
} Kind;

#define LIKE_PRINTF __attribute__((format(printf, 1, 2)))
void fake_count(Kind kind, size_t bytes);
void fake_line(const char* format, ...) LIKE_PRINTF;     // a line of the log, with its thread
void fake_illegal(const char* format, ...) LIKE_PRINTF;  // the same; a GPU would not have done it
void fake_stop(const char* what);  // the thread waits for a GPU here, or for the driver's locks

// -- device.c -------------------------------------------------------------------------------------
enum {
    MOST_GPUS = 8
};
extern __thread int fake_gpu;  // the thread's current one
int fake_sm(void);
int fake_gpus(void);
long long fake_gpu_bytes(void);
int fake_shared_bytes(void);                // of one block, at most
cudaError_t fake_error(cudaError_t error);  // the thread's last error, unless it is none

// -- memory.c -------------------------------------------------------------------------------------
typedef enum {
    PAGEABLE,
    PINNED,
    REGISTERED,
    DEVICE
} Place;
typedef struct {
    uintptr_t start;
    size_t size;
    Place place;
    int gpu;
} Range;
int fake_uniform(const void* at, size_t bytes);
Range fake_range(const void* at);  // the one that holds an address, or a pageable one of size 0

// -- streams.c, capture.c -------------------------------------------------------------------------
typedef struct {
    void* to;
    const void* from;
    size_t bytes;
} Copy;
typedef struct {
    int kernels, memsets, room, copied;
    Copy* copies;
} Graph;
typedef struct {
    int gpu, number, priority;
    int broken, mode;  // of a capture: something forbidden came, and what is forbidden
    unsigned long long id;
    Graph* graph;  // what it captures, or null
} Stream;
Stream* fake_stream(cudaStream_t handle);
cudaError_t fake_uncaptured(const char* call);            // no capture forbids this call
cudaError_t fake_idle(Stream* stream, const char* call);  // the stream captures nothing
int fake_any_capture(void);

// -- kernels.c, copies.c --------------------------------------------------------------------------
void fake_launched(cudaStream_t stream, Kind kind, const char* what);
void fake_move(void* to, const void* from, size_t bytes);
