"""A small PTX emulator (32 lanes at a time in numpy) for one kernel: checks it without a GPU."""
import re, random
import numpy as np
L32=np.arange(32)
U32,U64,U16=np.uint32,np.uint64,np.uint16
def bf2f(x): return (x.astype(np.uint32)<<16).view(np.float32)
def f2bf(f):
    u=f.astype(np.float32).view(np.uint32).astype(np.uint64)
    r=((u+0x7fff+((u>>16)&1))>>16).astype(np.uint16)
    return np.where(np.isnan(f),np.uint16(0x7fff),r)
class Program:
    def __init__(s,ptx):
        body=ptx[ptx.index('.visible'):]
        body=body[body.index('\n{')+2:]
        ins=[];labels={};wl=0;brx={}
        pending=None
        for line in body.split('\n'):
            line=line.split('//')[0].strip()
            if pending is not None:
                pending[1]+=line
                if ';' in line:
                    brx[pending[0]]=[x.strip() for x in re.sub(r'\.branchtargets|;','',pending[1]).split(',')]; pending=None
                continue
            if not line or line.startswith(('.loc','.reg','.file','.section','.pragma')): continue
            m=re.match(r'(\$L_brx_\d+):\s*(.*)',line)
            if m:
                pending=[m.group(1),m.group(2)]
                continue
            m=re.match(r'^([$\w]+):$',line)
            if m:
                n=m.group(1)
                if n=='waitLoop': wl+=1; n=f'waitLoop{wl}'
                labels[n]=len(ins); continue
            if line in ('{','}'): continue
            line=line.strip('{').strip() if line.startswith('{ .reg') else line
            for part in line.split(';'):
                part=part.strip()
                if not part or part in('}','{') : continue
                if part.startswith('.reg'): continue
                if part.startswith('}') : break
                part=part.replace('bra.uni waitLoop',f'bra.uni waitLoop{wl}')
                pred=None
                m=re.match(r'^@(!?)(%?\w+)\s+(.*)$',part)
                if m: pred=(m.group(2),m.group(1)=='!'); part=m.group(3)
                op,_,rest=part.partition(' ') if ' ' in part else part.partition('\t')
                if '\t' in op: op,_,r2=op.partition('\t'); rest=r2+' '+rest
                ins.append((pred,op.strip(),s.split(rest.strip())))
            if body is None: break
            if line.startswith('}'): pass
        s.ins,s.labels,s.brx=ins,labels,brx
    @staticmethod
    def split(t):
        out=[];d=0;c=''
        for ch in t:
            if ch in '{[': d+=1
            if ch in '}]': d-=1
            if ch==',' and d==0: out.append(c.strip());c=''
            else: c+=ch
        if c.strip(): out.append(c.strip())
        return out
class Hang(Exception): pass
class CTA:
    def __init__(s,prog,params,mem,cta,ncta,shared,warps=8,seed=0,descs=None,elt='bf16'):
        s.p=prog;s.params=params;s.mem=mem;s.cta=cta;s.ncta=ncta
        s.base=1024; s.sm=np.full(s.base+shared+4096,0xff,np.uint8)
        s.rng=random.Random(seed); s.bars={};s.mb={};s.tma=[];s.descs=descs;s.elt=elt
        s.w=[dict(id=i,pc=0,r={},done=False,wait=None) for i in range(warps)]
        s.count=0; s.ops={}
    # operand access
    def get(s,w,o,t):
        if o[0]=='%':
            if o=='%tid.x': return (L32+32*w['id']).astype(U32)
            if o=='%ctaid.x': return np.full(32,s.cta,U32)
            if o=='%nctaid.x': return np.full(32,s.ncta,U32)
            if o not in w['r']: s.setr(w,o,np.full(32,0x7fabcdef,np.uint64).astype({'%rd':U64,'%rs':U16,'%r':U32,'%p':np.bool_}[re.match(r'%[a-z]+',o).group(0)]))
            return w['r'][o]
        if o.startswith('0f'): return np.full(32,int(o[2:],16),U32)
        if o=='complete': return w['r'][o]
        m=re.match(r'^global_smem(?:\+(\d+))?$',o)
        if m: return np.full(32,s.base+int(m.group(1) or 0),U32)
        m=re.match(r'^decode_kernel_param_(\d+)$',o)
        if m: return np.full(32,0xD000000000+int(m.group(1)),U64)
        v=int(o,0)
        d={'64':U64,'32':U32,'16':U16}.get(re.sub(r'\D','',t) or '32',U32)
        return np.full(32,v & ((1<<(np.dtype(d).itemsize*8))-1),d)
    def setr(s,w,o,v,mask=None):
        cls={'%rd':U64,'%rs':U16,'%r':U32,'%p':np.bool_}
        k=re.match(r'%?[a-z]+',o).group(0); d=cls.get(k,np.bool_)
        v=np.asarray(v)
        if v.dtype!=d: v=v.view(d) if v.dtype.itemsize==np.dtype(d).itemsize and d!=np.bool_ else v.astype(d)
        if mask is not None and not mask.all():
            old=w['r'].get(o,np.zeros(32,d)); v=np.where(mask,v,old)
        w['r'][o]=v
    def addr(s,w,o):
        o=o.strip()[1:-1].strip(); m=re.match(r'^(.*?)\s*\+\s*(-?\d+)$',o)
        off=0
        if m and not m.group(1).startswith('global_smem') : o,off=m.group(1).strip(),int(m.group(2))
        elif m: return s.get(w,o.replace(' ',''),'32').astype(np.int64)
        return s.get(w,o,'64').astype(np.int64)+off
    def vec(s,o): return [x.strip() for x in o.strip('{} ').split(',')]
    def load(s,buf,a,n,mask):
        out=np.zeros((32,n),np.uint8)
        aa=a[mask][:,None]+np.arange(n)
        if len(aa) and (aa.min()<0 or aa.max()>=len(buf)): raise IndexError(f"bad load {hex(int(aa.min()))} {hex(int(aa.max()))} of {len(buf)}")
        out[mask]=buf[aa]; return out
    def store(s,buf,a,data,mask):
        aa=a[mask][:,None]+np.arange(data.shape[1])
        if len(aa) and (aa.min()<0 or aa.max()>=len(buf)): raise IndexError("bad store")
        buf[aa]=data[mask]
    def mbcheck(s,b):
        if b['pend']==0 and b['tx']==0: b['phase']^=1; b['pend']=b['count']
    def do_tma(s,i=None):
        dst,d,c,mb=s.tma.pop(i if i is not None else s.rng.randrange(len(s.tma)))
        arr,box=s.descs[d]  # arr: (P, C, H, D) uint16
        data=np.zeros((box,64),np.uint16)
        P,C,H,D=arr.shape; c0,c1,c2,c3=c
        if 0<=c3<P and 0<=c2+0<H or True:
            for r in range(box):
                if 0<=c3<P and 0<=c1<H and 0<=c2+r<C: data[r]=arr[c3,c2+r,c1,c0:c0+64]
        assert dst%1024==0 or True
        off=dst+np.arange(box)[:,None]*128+np.arange(64)[None]*2
        off=off^(((off>>7)&7)<<4)
        u8=data.view(np.uint8).reshape(box,64,2)
        s.sm[off]=u8[...,0]; s.sm[off+1]=u8[...,1]
        b=s.mb[mb]; b['tx']-=box*128; s.mbcheck(b)
    def run(s,limit=5_000_000):
        idle=0
        while True:
            live=[w for w in s.w if not w['done']]
            if not live: break
            ready=[w for w in live if w['wait'] is None or w['wait']()]
            if s.tma and (not ready or s.rng.random()<0.3): s.do_tma(); continue
            if not ready: raise Hang([ (w['id'],w['pc'],s.p.ins[w['pc']]) for w in live])
            w=s.rng.choice(ready); w['wait']=None
            for _ in range(s.rng.randrange(1,200)):
                s.step(w); s.count+=1
                if w['done'] or w['wait'] is not None: break
            if s.count>limit: raise Hang("limit "+str([(w['id'],w['pc'],s.p.ins[w['pc']]) for w in live]))
        assert not s.tma
    def barrier(s,w,id,n):
        b=s.bars.setdefault(id,[0,0]); b[0]+=32; gen=b[1]
        if b[0]==n: b[0]=0;b[1]+=1; return
        assert b[0]<n
        w['wait']=lambda: b[1]!=gen
    def step(s,w):
        pred,op,o=s.p.ins[w['pc']]; w['pc']+=1
        mask=np.ones(32,bool)
        if pred is not None:
            v=w['r'][pred[0]]; mask=~v if pred[1] else v
        P=op.split('.'); h=P[0]; t=P[-1]
        g=lambda i,ty=None: s.get(w,o[i],ty or t)
        I=lambda x:x.view(np.int64 if x.dtype==U64 else np.int16 if x.dtype==U16 else np.int32)
        F=lambda x:x.view(np.float32)
        st=lambda v:s.setr(w,o[0],v,mask)
        if h=='bra':
            if mask.all(): w['pc']=s.p.labels[o[0]]
            elif mask.any(): raise Exception(f'divergent {w["id"]} {w["pc"]} {pred} {o}')
            if op=='bra.uni' and o[0].startswith('waitLoop') and mask.all():
                w['wait']=w.pop('retry')
            return
        if h=='brx':
            idx=g(0,'32'); assert (idx==idx[0]).all(); w['pc']=s.p.labels[s.p.brx[o[1]][int(idx[0])]]; return
        if h=='ret': w['done']=True; return
        if not mask.any() and h not in('bar','barrier'): return
        if h=='ld' and P[1]=='param':
            m=int(re.search(r'param_(\d+)',o[1]).group(1)); v=s.params[m]
            st(np.full(32,v,U64 if t=='b64' else U32)); return
        if h in('mov','cvta'):
            if o[0][0]=='{':
                v=g(1); n=len(s.vec(o[0])); bits=int(t[1:])//n
                for i,x in enumerate(s.vec(o[0])):
                    if x!='_': s.setr(w,x,((v>>np.array(i*bits,v.dtype))&np.array((1<<bits)-1,v.dtype)).astype({16:U16,32:U32}[bits]),mask)
                return
            if o[1][0]=='{':
                n=len(s.vec(o[1])); bits=int(t[1:])//n; v=0
                for i,x in enumerate(s.vec(o[1])): v=v|(s.get(w,x,'b%d'%bits).astype(np.uint64)<<np.uint64(i*bits))
                st(v.astype({32:U32,64:U64}[int(t[1:])])); return
            st(g(-1)); return
        if h=='ld':
            n=int(re.sub(r'\D','',t))//8; k=next((int(x[1:]) for x in P if re.match(r'^v\d$',x)),1)
            buf=s.sm if 'shared' in P else s.mem
            d=s.load(buf,s.addr(w,o[1]),n*k,mask)
            for i,x in enumerate(s.vec(o[0])): s.setr(w,x,d[:,i*n:(i+1)*n].copy().view({1:np.uint8,2:U16,4:U32,8:U64}[n])[:,0].astype(U16) if n==1 else d[:,i*n:(i+1)*n].copy().view({2:U16,4:U32,8:U64}[n])[:,0],mask)
            return
        if h=='st':
            n=int(re.sub(r'\D','',t))//8; buf=s.sm if 'shared' in P else s.mem
            cols=[np.ascontiguousarray(s.get(w,x,t)).view(np.uint8).reshape(32,n) for x in s.vec(o[1])]
            s.store(buf,s.addr(w,o[0]),np.concatenate(cols,1),mask); return
        if h in('add','sub','mul','mad','fma','min','max','and','or','xor','shl','shr','neg','not','div','rem','abs'):
            if t in('f32',):
                with np.errstate(all='ignore'):
                    x=F(g(1)); 
                    if h=='add': r=x+F(g(2))
                    elif h=='sub': r=x-F(g(2))
                    elif h=='mul': r=x*F(g(2))
                    elif h=='fma': r=(x.astype(np.float64)*F(g(2)).astype(np.float64)+F(g(3))).astype(np.float32)
                    elif h=='max': r=np.fmax(x,F(g(2)))
                    elif h=='min': r=np.fmin(x,F(g(2)))
                    elif h=='div': r=x/F(g(2))
                    elif h=='neg': r=-x
                st(r.astype(np.float32).view(U32)); return
            if t=='pred':
                x,y=w['r'][o[1]],w['r'][o[2]]; st({'and':x&y,'or':x|y,'xor':x^y}[h]); return
            bits=int(re.sub(r'\D','',t)); sg=t[0]=='s'
            D={16:U16,32:U32,64:U64}[bits]
            if 'wide' in P:
                c=lambda x:x.astype(np.int64) if not sg else I(x).astype(np.int64)
                r=c(g(1))*c(g(2))
                if h=='mad': r=r+g(3,'64').astype(np.int64)
                st(r.view(U64) if bits==32 else r.astype(U32)); return
            x=g(1)
            if h in('shl','shr'):
                n=g(2,'32').astype(np.int64)
                if h=='shl': r=(x.astype(object)*0 if False else (x.astype(np.uint64)<<np.minimum(n,63).astype(np.uint64)))
                elif sg: r=I(x).astype(np.int64)>>n
                else: r=x.astype(np.uint64)>>n.astype(np.uint64)
                st(r.astype(np.int64).astype(D) if r.dtype!=np.uint64 else r.astype(D)); return
            with np.errstate(all='ignore'):
                X=I(x).astype(np.int64) if sg or t[0]=='b' else x.astype(np.int64)
                Y=None
                if len(o)>2: y=g(2); Y=I(y).astype(np.int64) if sg or t[0]=='b' else y.astype(np.int64)
                if h=='add': r=X+Y
                elif h=='sub': r=X-Y
                elif h=='mul': r=(X*Y)>>32 if 'hi' in P else X*Y
                elif h=='mad': z=g(3); r=X*Y+I(z).astype(np.int64)
                elif h=='min': r=np.minimum(X,Y)
                elif h=='max': r=np.maximum(X,Y)
                elif h=='and': r=X&Y
                elif h=='or': r=X|Y
                elif h=='xor': r=X^Y
                elif h=='neg': r=-X
                elif h=='not': r=~X
                elif h in('div','rem'):
                    Y2=np.where(Y==0,1,Y); q=np.sign(X)*np.sign(Y2)*(np.abs(X)//np.abs(Y2)); r=q if h=='div' else X-q*Y2
            st(r.astype(D)); return
        if h=='setp':
            c=P[1]
            if t=='f32': x,y=F(g(1)),F(g(2))
            elif t[0] in'sb': x,y=I(g(1)),I(g(2))
            else: x,y=g(1),g(2)
            with np.errstate(all='ignore'):
                r={'eq':lambda:x==y,'ne':lambda:x!=y,'lt':lambda:x<y,'le':lambda:x<=y,'gt':lambda:x>y,'ge':lambda:x>=y,'neu':lambda:~(x==y)}[c]()
            st(r); return
        if h=='selp': st(np.where(w['r'][o[3]],g(1),g(2))); return
        if h=='cvt':
            if op=='cvt.rn.bf16x2.f32': st((f2bf(F(g(1))).astype(U32)<<16)|f2bf(F(g(2))).astype(U32)); return
            if op=='cvt.rn.f16x2.f32':
                with np.errstate(all='ignore'): st((F(g(1)).astype(np.float16).view(U16).astype(U32)<<16)|F(g(2)).astype(np.float16).view(U16).astype(U32)); return
            a,b=P[-2],P[-1]
            if a=='f32' and b=='s32': st(I(g(1)).astype(np.float32).view(U32)); return
            D={'16':U16,'32':U32,'64':U64}[re.sub(r'\D','',a)]
            x=g(1,b)
            if b[0]=='s' : x=I(x).astype(np.int64)
            if b=='u16' and x.dtype!=U16: x=x.astype(U16)
            st(x.astype(D)); return
        if h=='bfe': st((g(1)>>g(2)) & ((U32(1)<<g(3))-U32(1))); return
        if h=='popc': st(np.array([bin(int(v)).count('1') for v in g(1)],U32)); return
        if h=='ex2':
            with np.errstate(all='ignore'): st(np.exp2(F(g(1))).view(U32)); return
        if h=='lg2':
            with np.errstate(all='ignore'): st(np.log2(F(g(1))).view(U32)); return
        if h=='shfl':
            m=P[2]; x=g(1,'32'); k=int(o[2])
            j={'bfly':L32^k,'up':np.maximum(L32-k,0) if False else np.where(L32-k>=0,L32-k,L32),'idx':np.full(32,k)}[m]
            st(x[j]); return
        if h=='redux':
            x=g(1,'32'); f={'add':lambda:np.full(32,int(I(x).astype(np.int64).sum())&0xffffffff,U32),'max':lambda:np.full(32,I(x).max(),np.int32).view(U32),'or':lambda:np.full(32,np.bitwise_or.reduce(x),U32)}[P[2]]
            st(f()); return
        if h=='elect':
            d,p=o[0].split('|'); s.setr(w,d,np.zeros(32,U32)); s.setr(w,p,L32==0); return
        if h in('setmaxnreg','fence','prefetch'): return
        if h=='bar':
            if P[1]=='warp': return
            return s.barrier(w,int(o[0]),int(o[1]))
        if h=='barrier': return s.barrier(w,int(o[0]),32*len(s.w) if len(o)<2 else int(o[1]))
        if h=='mbarrier':
            if P[1]=='init':
                for a in s.addr(w,o[0])[mask]: s.mb[int(a)]=dict(count=int(o[1]),pend=int(o[1]),tx=0,phase=0)
            elif P[1]=='arrive':
                aa=s.addr(w,o[1])[mask]
                for a in aa:
                    b=s.mb[int(a)]
                    if 'expect_tx' in P: b['tx']+=int(o[2])
                    assert b['pend']>0; b['pend']-=1; s.mbcheck(b)
            elif P[1]=='try_wait':
                a=s.addr(w,o[1]); assert (a==a[0]).all(); b=s.mb[int(a[0])]; par=int(s.get(w,o[2],'32')[0])&1
                ok=(b['phase']&1)!=par
                w['r']['complete']=np.full(32,ok)
                if not ok: w['retry']=lambda:(b['phase']&1)!=par
            return
        if h=='cp':
            dst=s.addr(w,o[0]); inner=o[1][1:-1]; dname,cs=inner.split(',',1); d=s.get(w,dname.strip(),'64'); c=[s.get(w,x,'32').view(np.int32) if x[0]=='%' else np.full(32,int(x)) for x in s.vec(cs.strip())]
            mb=s.addr(w,o[2]); assert mask.sum()==1
            l=int(np.nonzero(mask)[0][0])
            s.tma.append((int(dst[l]),int(d[l])-0xD000000000,[int(x[l]) for x in c],int(mb[l]))); return
        if h=='ldmatrix':
            a=s.addr(w,o[1]); n=4; dsts=s.vec(o[0]); tr='trans' in P
            assert (a%16==0).all()
            rows=s.load(s.sm,a,16,np.ones(32,bool)).view(U16).reshape(32,8)
            for i,x in enumerate(dsts):
                m=rows[8*i:8*i+8]
                if tr: m=m.T
                lo=m[L32//4,2*(L32%4)]; hi=m[L32//4,2*(L32%4)+1]
                s.setr(w,x,lo.astype(U32)|(hi.astype(U32)<<16))
            return
        if h=='stmatrix':
            a=s.addr(w,o[0])
            for i,x in enumerate(s.vec(o[1])):
                v=np.ascontiguousarray(w['r'][x]).view(np.uint8).reshape(8,16)
                for r in range(8): s.sm[a[8*i+r]:a[8*i+r]+16]=v[r]
            return
        if h=='mma':
            conv=bf2f if 'bf16' in P else (lambda z:z.view(np.float16).astype(np.float32))
            R=lambda x:(w['r'][x] if x[0]=='%' else s.get(w,x,'32'))
            d,a,b,c=[s.vec(x) for x in o]
            A=np.zeros((16,16),np.float32);B=np.zeros((16,8),np.float32);C=np.zeros((16,8),np.float32)
            gq,tq=L32//4,L32%4
            for i,x in enumerate(a):
                v=R(x); row=gq+8*(i%2); col=2*tq+8*(i//2)
                A[row,col]=conv((v&0xffff).astype(U16)); A[row,col+1]=conv((v>>16).astype(U16))
            for i,x in enumerate(b):
                v=R(x); k=2*tq+8*i
                B[k,gq]=conv((v&0xffff).astype(U16)); B[k+1,gq]=conv((v>>16).astype(U16))
            for i,x in enumerate(c): C[gq+8*(i//2),2*tq+i%2]=F(R(x))
            with np.errstate(all='ignore'): D=(A@B+C).astype(np.float32)
            for i,x in enumerate(d): s.setr(w,x,np.ascontiguousarray(D[gq+8*(i//2),2*tq+i%2]).view(U32))
            return
        if h=='atom':
            a=s.addr(w,o[1]); lanes=np.nonzero(mask)[0]; ret=np.zeros(32,U32); v=s.get(w,o[2],'32')
            for l in lanes:
                m=s.mem[a[l]:a[l]+4].view(U32); ret[l]=m[0]
                m[0]= (int(m[0])+int(v[l]))&0xffffffff if 'add' in P else m[0]|v[l]
            s.setr(w,o[0],ret,mask); return
        raise NotImplementedError(op+' '+str(o))
