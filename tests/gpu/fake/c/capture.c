// Captures, what they forbid to whom, and the graphs that they end in.
#include "fake.h"

#include <stdlib.h>

static __thread int mode = cudaStreamCaptureModeGlobal;  // what the thread asks to be kept from
static __thread int own;                                 // captures that the thread began
static int everybodys;  // those that are not to be disturbed by anybody
static int under_way;
static unsigned long long ids;

int fake_any_capture(void) { return under_way; }

cudaError_t fake_uncaptured(const char* call) {
    if (mode == cudaStreamCaptureModeRelaxed) return 0;
    if (!own && !(mode == cudaStreamCaptureModeGlobal && everybodys)) return 0;
    fake_illegal("%s during a capture", call);
    return fake_error(cudaErrorStreamCaptureUnsupported);
}

cudaError_t fake_idle(Stream* stream, const char* call) {
    if (!stream->graph) return 0;
    stream->broken = 1;
    fake_illegal("%s of a stream that is captured", call);
    return fake_error(cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* wanted) {
    int before = mode;
    mode = *wanted;
    *wanted = before;
    return 0;
}

// 1 or -1 more captures of a mode
static void add(int captures, int of) {
    own += of == cudaStreamCaptureModeRelaxed ? 0 : captures;
    __atomic_add_fetch(&everybodys, of == cudaStreamCaptureModeGlobal ? captures : 0,
                       __ATOMIC_RELAXED);
    __atomic_add_fetch(&under_way, captures, __ATOMIC_RELAXED);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode wanted) {
    Stream* stream = fake_stream(handle);
    if (!stream->number) return fake_error(cudaErrorStreamCaptureUnsupported);
    if (stream->graph) return fake_error(cudaErrorIllegalState);
    stream->graph = calloc(1, sizeof *stream->graph);
    stream->mode = wanted;
    stream->broken = 0;
    stream->id = __atomic_add_fetch(&ids, 1, __ATOMIC_RELAXED);
    add(1, wanted);
    fake_line("capture begins on gpu%d stream %d", stream->gpu, stream->number);
    return 0;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* made) {
    Stream* stream = fake_stream(handle);
    Graph* graph = stream->graph;
    if (!graph) return fake_error(cudaErrorIllegalState);
    add(-1, stream->mode);
    stream->graph = 0;
    fake_line("capture ends on gpu%d stream %d: %d kernels, %d copies, %d fills%s", stream->gpu,
              stream->number, graph->kernels, graph->copied, graph->memsets,
              stream->broken ? ", broken" : "");
    *made = stream->broken ? 0 : (cudaGraph_t)graph;
    return stream->broken ? fake_error(cudaErrorStreamCaptureInvalidated) : 0;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus* status) {
    const Stream* stream = fake_stream(handle);
    *status = !stream->graph   ? cudaStreamCaptureStatusNone
              : stream->broken ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
    return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
    const Stream* stream = fake_stream(handle);
    if (status) cudaStreamIsCapturing(handle, status);
    if (id) *id = stream->id;
    if (graph) *graph = (cudaGraph_t)stream->graph;
    if (count) *count = 0;
    return 0;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                          unsigned long long flags) {
    *made = (cudaGraphExec_t)graph;
    return 0;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph,
                                 unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(made, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t launched, cudaStream_t handle) {
    const Graph* graph = (const Graph*)launched;
    const Stream* stream = fake_stream(handle);
    fake_count(GRAPH, 0);
    fake_line("graph of %d kernels gpu%d stream %d", graph->kernels, stream->gpu, stream->number);
    for (int at = 0; at < graph->copied; at++)
        fake_move(graph->copies[at].to, graph->copies[at].from, graph->copies[at].bytes);
    return 0;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    const Graph* of = (const Graph*)graph;
    *count = (size_t)(of->kernels + of->copied + of->memsets);
    return 0;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t* found,
                                         cudaGraphEdgeData* edges, size_t* count) {
    *count = 0;
    return 0;
}
