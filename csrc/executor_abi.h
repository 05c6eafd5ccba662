// The border between the core and a GPU module, a shared library that runs a range of layers on a device: plain C,
// without macros, so that cffi reads it too (Python leaves out the lines that begin with #).
//
// Functions return a status and leave the reason of a failure in gemmart_last_error() of the calling thread. They
// neither print nor throw nor exit. Of one executor and its contexts one function runs at a time; different executors
// may run at once. Pointers to host memory are read or written during the call only.
#ifndef GEMMART_EXECUTOR_ABI_H
#define GEMMART_EXECUTOR_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Raised with every change of this file; the core refuses a module of another version.
enum { GEMMART_ABI_VERSION = 1 };

enum {
    GEMMART_OK = 0,
    GEMMART_DEVICE_ERROR = 1,   // no device, no driver, or it failed
    GEMMART_OUT_OF_MEMORY = 2,  // of the device; everything else is as before
    GEMMART_CANCELLED = 3,      // the reader said so
    GEMMART_UNSUPPORTED = 4,    // a model that this module does not run
    GEMMART_INVALID = 5         // arguments that the caller should not have given
};

// ---- What there is

typedef struct GemmartBuild {
    const char* backend;   // "cuda", "hip" or "emulated"
    const char* version;   // of gemmart
    const char* compiler;  // name and version
    const char* archs;     // that it was compiled for, by commas: "sm_80,sm_90a,compute_75"
    const char* gemm;      // what multiplies many rows: "tinyblas", "cublas" or "hipblas"
} GemmartBuild;

typedef struct GemmartDevice {
    char name[128];
    char arch[32];  // "sm_90", "gfx90a"
    uint64_t total_bytes, free_bytes;
    int32_t n_units;    // multiprocessors
    int32_t usable;     // whether this module has code for it
    char problem[256];  // why not
} GemmartDevice;

int32_t gemmart_abi_version(void);
void gemmart_build(GemmartBuild* build);
const char* gemmart_last_error(void);
// Fails with GEMMART_DEVICE_ERROR where there is no driver; none found is 0 devices.
int32_t gemmart_count_devices(int32_t* n);
int32_t gemmart_device(int32_t device, GemmartDevice* found);

// ---- A range of layers

typedef struct GemmartTensor {
    uint32_t dtype;          // a GGUF type id
    int32_t n_rows, n_cols;  // 0: there is none
    uint64_t offset;         // what the reader calls it by
} GemmartTensor;

typedef struct GemmartLayer {
    int32_t n_heads, n_kv_heads, head_dim, ffn_dim;
    int32_t window;     // tokens; 0: everything
    int32_t rope;       // index into ropes
    float query_scale;  // multiplies queries after rope
    GemmartTensor wq, wk, wv, wo, gate, up, down;
    const float *attn_norm, *ffn_norm;            // [dim]
    const float *post_attn_norm, *post_ffn_norm;  // [dim] or null
    const float *q_norm, *k_norm;                 // [head_dim] or null
} GemmartLayer;

typedef struct GemmartRope {
    int32_t neox;            // pairs (i, i + half); otherwise neighbours
    int32_t half;            // head_dim / 2
    const double* inv_freq;  // [half] radians a position
} GemmartRope;

typedef struct GemmartRange {
    int32_t dim, n_vocab;
    int32_t n_batch;  // most tokens of a forward
    float norm_eps;
    float attention_softcap, final_softcap;  // 0: none
    int32_t silu;                            // the activation: SiLU, otherwise GELU in its tanh form
    int32_t precise;                         // activations of nearly float32 precision
    int32_t n_layers;
    const GemmartLayer* layers;
    int32_t n_ropes;
    const GemmartRope* ropes;
    const float* output_norm;  // [dim]; null: the head is not part of the range
    GemmartTensor output;
    int32_t own_gemm;  // many rows are multiplied by our own kernels, whatever the module was built with
} GemmartRange;

typedef struct GemmartKv {
    int32_t type;        // 0 float32, 1 float16, 2 bfloat16, 3 Q8_0 (kv_layout.h)
    int64_t n_pages[2];  // of the layers that see everything, and of those with a window
} GemmartKv;

typedef struct GemmartNeed {
    uint64_t weights, buffers, kv;  // bytes on the device; what the driver takes for itself is not counted
} GemmartNeed;

// Bytes [offset, offset + n_bytes) of the model into `to`; not 0: the load is cancelled. Several threads may call it at
// once.
typedef struct GemmartReader {
    int32_t (*read)(void* user, uint64_t offset, void* to, uint64_t n_bytes);
    void* user;
} GemmartReader;

typedef struct GemmartExecutor GemmartExecutor;
typedef struct GemmartContext GemmartContext;

// Needs no device, and no numbers of vectors. Logits, which grow with the rows that ask for them, are not counted.
int32_t gemmart_plan(const GemmartRange* range, const GemmartKv* kv, GemmartNeed* need);
int32_t gemmart_load(int32_t device, const GemmartRange* range, const GemmartReader* reader, GemmartExecutor** loaded);
void gemmart_free(GemmartExecutor* executor);

// ---- Keys, values and logits of sequences

// Pages are numbered by the core; a page's bytes are those of kv_layout.h, layer by layer.
int32_t gemmart_new_context(GemmartExecutor* executor, const GemmartKv* kv, GemmartContext** made);
void gemmart_free_context(GemmartContext* context);
// group 0: layers that see everything, 1: those with a window. All of the range's layers of it.
int32_t gemmart_copy_page(GemmartContext* context, int32_t group, int32_t from, int32_t to);
// layer: index in the range. A layer's part of a page.
int32_t gemmart_read_page(GemmartContext* context, int32_t layer, int32_t page, void* to);
int32_t gemmart_write_page(GemmartContext* context, int32_t layer, int32_t page, const void* from);

// ---- Computing

typedef struct GemmartSegment {
    int32_t start, n_tokens;  // positions of one sequence
    const int32_t* pages[2];  // by group: the sequence's pages in order of position, -1 where the window has gone on
    int32_t n_pages[2];
} GemmartSegment;

typedef struct GemmartBatch {
    int32_t n_segments;
    const GemmartSegment* segments;  // their rows stand one behind the other
    int32_t n_outputs;
    const int32_t* outputs;  // rows that want logits, ascending
    int32_t n_hidden;
    const int32_t* hidden;  // rows that want their state behind the last norm instead, ascending
} GemmartBatch;

// x [n_tokens, dim]: the residual stream before the range, and behind it where the head is not part of it. With the
// head: logits of the rows `outputs` are kept for the next two functions, states of the rows `hidden` go to hidden
// [n_hidden, dim], finite [n_outputs + n_hidden]: whether these rows are, outputs first.
int32_t gemmart_forward(GemmartContext* context, const GemmartBatch* batch, float* x, float* hidden, uint8_t* finite);
// Rows [first, first + n) of the last forward's logits, [n, n_vocab] soft-capped.
int32_t gemmart_logits(GemmartContext* context, int32_t first, int32_t n, float* to);

typedef struct GemmartAdjustments {
    int32_t n_bias;
    const int32_t* bias_ids;  // logits[bias_ids[i]] += bias[i]
    const float* bias;
    int32_t n_recent;
    const int32_t* recent;  // tokens that the penalties punish, repeats included
    float repeat_penalty, presence_penalty, frequency_penalty;
    const int32_t* mask;  // [ceil(n_vocab / 32)] bits of the tokens that may be chosen; null: all
} GemmartAdjustments;

// The k best of a row of logits after bias and penalties: ids and logits [k] by descending logit, ties by ascending
// id; *n_found < k where the mask allows fewer. logsumexp: of all that may be chosen.
int32_t gemmart_select(GemmartContext* context, int32_t row, int32_t k, const GemmartAdjustments* adjustments,
                       int32_t* ids, float* logits, double* logsumexp, int32_t* n_found);

#ifdef __cplusplus
}
#endif

#endif
