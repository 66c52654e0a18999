// A stand-in for the CANN runtime on a machine without one: one device whose memory is malloc's, and
// streams and events that are numbers. Launches succeed and do nothing. With CANN_SHIM_OPTRACE set,
// each launch, event and collective is printed with its stream.
#include <cstring>
#include <cstdio>
#include <cstdlib>
#include <cstdint>
#include <string>
#include "graph/ascend_string.h"
#include "graph/graph.h"
#include "graph/gnode.h"
#include "graph/operator_factory.h"
#include "ge/ge_api.h"
#include <map>
#include <fstream>
typedef int aclError; typedef void* P;
static int ndev() { const char* e = getenv("CANN_SHIM_DEVICES"); return e ? atoi(e) : 1; }
static thread_local int cur = 0;
static char tok[64];
static uintptr_t next_tok = 0x1000;
#define API extern "C" __attribute__((visibility("default")))
API aclError aclrtGetDeviceCount(uint32_t* n) { *n = ndev(); return 0; }
API aclError aclrtSetDevice(int d) { if (d < 0 || d >= ndev()) return 107001; cur = d; return 0; }
API aclError aclrtGetDevice(int* d) { *d = cur; return 0; }
API const char* aclrtGetSocName() { const char* e = getenv("CANN_SHIM_SOC"); return e ? e : "Ascend910B2"; }
API const char* aclGetRecentErrMsg() { return "cann-shim"; }
API aclError aclrtGetMemInfo(int, size_t* f, size_t* t) { *f = *t = size_t(8) << 30; return 0; }
static void* al(size_t n) { return aligned_alloc(512, (n + 1023) / 512 * 512); }
API aclError aclrtMalloc(void** p, size_t n, int) { *p = al(n); return *p ? 0 : 207001; }
API aclError aclrtMallocAlign32(void** p, size_t n, int) { *p = al(n); return 0; }
API aclError aclrtFree(void* p) { free(p); return 0; }
API aclError aclrtMallocHost(void** p, size_t n) { *p = al(n); return 0; }
API aclError aclrtFreeHost(void* p) { free(p); return 0; }
API aclError aclrtMemcpy(void* d, size_t, const void* s, size_t n, int) { memmove(d, s, n); return 0; }
API aclError aclrtMemcpyAsync(void* d, size_t, const void* s, size_t n, int, P) { memmove(d, s, n); return 0; }
API aclError aclrtMemset(void* d, size_t, int v, size_t n) { memset(d, v, n); return 0; }
API aclError aclrtMemsetAsync(void* d, size_t, int v, size_t n, P) { memset(d, v, n); return 0; }
static void tr(const char* n, P a, P s) { if (getenv("CANN_SHIM_OPTRACE")) fprintf(stderr, "[op] %-34s stream=%p event=%p\n", n, s, a); }
API aclError aclrtRecordEvent(P e, P s) { tr("aclrtRecordEvent", e, s); return 0; }
API aclError aclrtStreamWaitEvent(P s, P e) { tr("aclrtStreamWaitEvent", e, s); return 0; }
static aclError mk(P* s) { *s = (P)(next_tok += 16); return 0; }
API aclError aclrtCreateStream(P* s) { return mk(s); }
API aclError aclrtCreateStreamWithConfig(P* s, uint32_t, uint32_t) { return mk(s); }
API aclError aclrtCreateEventExWithFlag(P* s, uint32_t) { return mk(s); }
API aclError aclrtCreateEventWithFlag(P* s, uint32_t) { return mk(s); }
API aclError aclrtQueryEventStatus(P, int* s) { *s = 1; return 0; }        // COMPLETE
API aclError aclrtEventElapsedTime(float* t, P, P) { *t = 0; return 0; }
API aclError aclrtStreamGetId(P s, int32_t* id) { *id = (int32_t)(uintptr_t)s; return 0; }
API aclError aclrtGetCurrentContext(P* c) { *c = tok; return 0; }
API aclError aclrtDeviceCanAccessPeer(int32_t* c, int, int) { *c = 1; return 0; }
API aclError aclrtDeviceGetBareTgid(int32_t* p) { *p = 1; return 0; }
API aclError aclGetDeviceCapability(uint32_t, int, int64_t* v) { *v = 24; return 0; }
API size_t aclGetCompileoptSize(int) { return 4; }
API aclError aclGetCompileopt(int, char* v, size_t n) { if (n) v[0] = 0; return 0; }
API aclError aclsysGetVersionStr(char* name, char* v) { strcpy(v, "8.5.0"); return 0; }
// HCCL: communicators are tokens, names are stable strings; collectives (zero stubs) succeed without moving data
API int HcclGetRootInfo(void* r) { memset(r, 7, 64); return 0; }
API int HcclCommInitRootInfo(uint32_t, const void*, uint32_t, P* c) { return mk(c); }
API int HcclCommInitRootInfoConfig(uint32_t, const void*, uint32_t, const void*, P* c) { return mk(c); }
API int HcclCommInitClusterInfoConfig(const char*, uint32_t, const void*, P* c) { return mk(c); }
API int HcclGetCommName(P c, char* n) { snprintf(n, 128, "hccl_shim_%d", (int)((uintptr_t)c - 0x1000) / 16); return 0; }
API uint32_t HcclGetCommConfigCapability() { return 4; }
static void trc(const char* n, P s) { if (getenv("CANN_SHIM_OPTRACE")) fprintf(stderr, "[op] %-34s stream=%p\n", n, s); }
API int HcclAlltoAllV(const void*, const void*, const void*, int, const void*, const void*, const void*, int, P, P s) { trc("HcclAlltoAllV", s); return 0; }
API int HcclAlltoAll(const void*, uint64_t, int, const void*, uint64_t, int, P, P s) { trc("HcclAlltoAll", s); return 0; }
// ACL graph capture: a per-stream "capturing" flag so that capture_begin/end succeed (kernels then run eagerly; replay is a no-op)
static std::map<P, P> cap;
static uintptr_t next_ri = 1;
API aclError aclmdlRICaptureBegin(P s, int) { cap[s] = (P)(next_ri += 8); return 0; }
API aclError aclmdlRICaptureGetInfo(P s, int* st, P* ri) { auto i = cap.find(s); *st = i != cap.end(); if (ri) *ri = i != cap.end() ? i->second : nullptr; return 0; }
API aclError aclmdlRIExecuteAsync(P ri, P s) { tr("aclmdlRIExecuteAsync", ri, s); return 0; }
API aclError aclmdlRICaptureEnd(P s, P* ri) { *ri = cap[s]; cap.erase(s); return 0; }
// securec
#include <cstdio>
#include <cstdarg>
API int vsnprintf_s(char* d, size_t m, size_t c, const char* f, va_list a) { return vsnprintf(d, m, f, a); }
API int snprintf_s(char* d, size_t m, size_t c, const char* f, ...) { va_list a; va_start(a, f); int r = vsnprintf(d, m, f, a); va_end(a); return r; }
API int strcpy_s(char* d, size_t m, const char* s) { if (strlen(s) >= m) return 34; strcpy(d, s); return 0; }
// ge::AscendString (returned/held by value, so must really construct)
namespace ge {
AscendString::AscendString(const char_t* n) : name_(n ? std::make_shared<std::string>(n) : nullptr) {}
const char_t* AscendString::GetString() const { return name_ ? name_->c_str() : ""; }
bool AscendString::operator<(const AscendString& o) const { return strcmp(GetString(), o.GetString()) < 0; }
bool AscendString::operator==(const AscendString& o) const { return !strcmp(GetString(), o.GetString()); }
}
// GE: keep the serialized graph so that SaveToFile (dynamo_export) writes it; functions returning objects must construct them
namespace ge {
static std::map<const void*, std::string>& blobs() { static std::map<const void*, std::string> m; return m; }
Graph::Graph(const char_t*) {}
graphStatus Graph::LoadFromSerializedModelArray(const void* p, size_t n) { blobs()[this].assign((const char*)p, n); return 0; }
graphStatus Graph::CopyFrom(const Graph& o) { blobs()[this] = blobs()[&o]; return 0; }
graphStatus Graph::SaveToFile(const char_t* f) const { std::ofstream(f, std::ios::binary) << blobs()[this]; return 0; }
std::vector<GNode> Graph::GetAllNodes() const { return {}; }
bool OperatorFactory::IsExistOp(const char_t*) { return true; }
}
// returned by value (hidden pointer), declared here by mangled name because the header lacks them
API void* _ZN2ge7Session23GetCompiledGraphSummaryEj(void* r, void*, uint32_t) { memset(r, 0, 16); return r; }   // null shared_ptr -> clean "Failed get compiled summary"
static void es(void* r) { new (r) std::string("cann-shim"); }
API void* _ZN2ge13GEGetErrorMsgEv(void* r) { es(r); return r; }
API void* _ZN2ge17GEGetWarningMsgV2Ev(void* r) { new (r) ge::AscendString("cann-shim"); return r; }
