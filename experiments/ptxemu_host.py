"""decode_hopper.forward on the CPU, the launch replaced by the PTX emulator on real addresses."""
import ctypes, random, math, dataclasses, sys
import numpy as np, torch
import comp, ptxemu
from attn_ladder import decode_hopper as dh, launch, decode
from attn_profiling import serving_check as base
class Mem:  # absolute addresses
    def __len__(s): return 1<<62
class CTA(ptxemu.CTA):
    def load(s,buf,a,n,mask):
        if buf is s.sm: return super().load(buf,a,n,mask)
        out=np.zeros((32,n),np.uint8)
        for l in np.nonzero(mask)[0]: s.check(int(a[l]),n); out[l]=np.frombuffer(ctypes.string_at(int(a[l]),n),np.uint8)
        return out
    def store(s,buf,a,data,mask):
        if buf is s.sm: return super().store(buf,a,data,mask)
        for l in np.nonzero(mask)[0]: s.check(int(a[l]),data.shape[1]); ctypes.memmove(int(a[l]),np.ascontiguousarray(data[l]).tobytes(),data.shape[1])
    def check(s,a,n): assert 2**20<a<2**48,hex(a)
    def step(s,w):
        pred,op,o=s.p.ins[w['pc']]
        if op.startswith('atom'):
            w['pc']+=1; mask=np.ones(32,bool)
            if pred: v=w['r'][pred[0]]; mask=~v if pred[1] else v
            if not mask.any(): return
            a=s.addr(w,o[1]); v=s.get(w,o[2],'32'); ret=np.zeros(32,np.uint32)
            for l in np.nonzero(mask)[0]:
                c=ctypes.c_uint32.from_address(int(a[l])); ret[l]=c.value
                c.value=(c.value+int(v[l]))&0xffffffff if 'add' in op else c.value|int(v[l])
            s.setr(w,o[0],ret,mask); return
        return super().step(w)
class Fake:
    cache={}
    def __init__(s,cfg,dtype,device):
        c=comp.compile_(cfg,launch.DTYPES[dtype],dh.REGISTERS); s.prog=ptxemu.Program(c.asm["ptx"]); s.shared=c.metadata.shared; s.cfg=cfg
    def tensor_maps(s,*layouts):
        def enc(*ptr):
            out=[]
            for l in layouts:
                ext=sum((n-1)*st for n,st in zip(l.shape,l.strides))+1
                raw=np.frombuffer((ctypes.c_uint16*ext).from_address(ptr[l.tensor]),np.uint16)
                arr=np.lib.stride_tricks.as_strided(raw,l.shape,[2*x for x in l.strides])
                out+=[arr,*l.shape,*l.strides]
            return tuple(out)
        return enc
    def launch(s,grid,stream,args):
        k,v=args[0],args[9]; ptrs=args[18:28]; call=args[28]; scale=args[29]; assert args[30] is None and len(args)==31
        params={18+i:p for i,p in enumerate(ptrs)}; params|={28+i:x&0xffffffff for i,x in enumerate(call)}
        params[42]=int(np.float32(scale).view(np.uint32)); params[43]=params[44]=0
        assert len(call)==14
        order=list(range(grid)); random.Random(1).shuffle(order)
        for c in order: CTA(s.prog,params,Mem(),c,grid,s.shared,seed=c,descs={0:(k,s.cfg.box),9:(v,s.cfg.box)}).run()
dh.compiled=lambda cfg,dtype,device: Fake.cache.setdefault((cfg,dtype),None) or Fake.cache.__setitem__((cfg,dtype),Fake(cfg,dtype,device)) or Fake.cache[cfg,dtype]
torch._C._cuda_getCurrentRawStream=lambda d:0
launch.multiprocessors=lambda d:2
def run(case,config=None,seed=0):
    cache=base.Cache(case,"cpu",seed)
    why=dh.unsupported(cache.q,*cache.stores,block_table=cache.arguments.get("block_table"),capability=(9,0)); assert why is None,why
    out,lse=dh.forward(cache.q,*cache.stores,bounds=cache.lens,index=cache.arguments.get("cache_batch_idx"),block_table=cache.arguments.get("block_table"),causal=case.causal,config=config)
    k,v=cache.keys
    text=base.compare([(out[b],lse[b],cache.q[b],k[b,:n],v[b,:n]) for b,n in enumerate(case.lens)],case.causal)
    base.no_errors("cpu"); assert not decode.counters(torch.device("cpu"),1).any()
    return text,out,lse,cache
C=base.Cached
with base.poisoned():
    for case in (C("bf16",(300,0,65),512,8,2,128),C("bf16",(300,0,65),512,8,2,128,64),C("fp16",(300,5),512,6,3,64,16,seqlen_q=4),
             C("bf16",(300,9,65),320,8,2,128,rows=(4,0,2)),C("bf16",(300,40),320,8,2,128,transposed=True,causal=False,seqlen_q=2)):
        print(case.id,run(case)[0],flush=True)
# bits: alone, other capacity, paged
case=C("bf16",(300,0,513),640,8,2,128); _,out,lse,cache=run(case,dh.Config(64,3,2,128))
for b,n in enumerate(case.lens):
    one=slice(b,b+1); k,v=(x[one,:max(n,1)].clone() for x in cache.keys)
    o,l=dh.forward(cache.q[one],k,v,bounds=cache.lens[one].clone(),causal=True,config=dh.Config(64,6,1,128))
    assert torch.equal(o,out[one]) and torch.equal(l,lse[one]),b
paged=base.Cache(dataclasses.replace(case,page=64,capacity=640),"cpu"); paged.q.copy_(cache.q)
for store,keys in zip(paged.stores,cache.keys):
    for b,n in enumerate(case.lens): paged.write(store,b,0,keys[b,:n])
o,l=dh.forward(paged.q,*paged.stores,bounds=paged.lens,block_table=paged.arguments["block_table"],config=dh.Config(64,3,2,128))
print("paged equal",torch.equal(o,out),torch.equal(l,lse))
