import torch, time, cProfile, pstats
import moe_fx
from moe_fx.bench import layers as L
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers import Qwen3MoeConfig
c=Qwen3MoeConfig(hidden_size=2048,moe_intermediate_size=768,num_experts=128,num_experts_per_tok=8,norm_topk_prob=True); c._experts_implementation="grouped_mm"
with torch.device("cuda"): m=Qwen3MoeSparseMoeBlock(c).to(torch.bfloat16).eval()
for p in m.parameters(): p.data.normal_(0,.02)
x=torch.randn(1,16,2048,device="cuda",dtype=torch.bfloat16)
from moe_fx.devices.cuda import launch
with torch.no_grad():
    for name,kw in (("hf",dict(backend="inductor")),("ours",dict(backend="moe_fx",options={"strict":True,"progress":False}))):
        torch._dynamo.reset(); f=torch.compile(m,dynamic=False,**kw); f(x); f(x); f(x)
        torch.cuda.synchronize(); ts=[]
        for _ in range(30):
            t=time.perf_counter(); f(x); ts.append(time.perf_counter()-t); torch.cuda.synchronize()
        print(name,"host us",sorted(ts)[15]*1e6)
        p=cProfile.Profile(); p.enable()
        for _ in range(50): f(x)
        p.disable(); pstats.Stats(p).sort_stats("tottime").print_stats(22)
    print({str(k)[:60]: (v is not None) for k,v in launch._kinds.items()})
