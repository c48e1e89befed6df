import sys, time, os, functools, traceback
import jax, jax.numpy as jnp, numpy as np
from blockjax.masks import BlockMask, Causal, Window
from blockjax.kernels.block_sparse_attention import hopper, reference, xla
from blockjax.kernels.block_sparse_attention.spec import Inputs
print(jax.devices(), jax.__version__)
def mk(mask,B,N,K,H,Hv=None,dtype=jnp.bfloat16,seed=0,seg=False,pos=False,bias=False):
    Hv=Hv or H
    ks=jax.random.split(jax.random.key(seed),5)
    q=jax.random.normal(ks[0],(B,mask.T,N,H),dtype);k=jax.random.normal(ks[1],(B,mask.S,K,H),dtype);v=jax.random.normal(ks[2],(B,mask.S,K,Hv),dtype)
    do=jax.random.normal(ks[3],(B,mask.T,N,Hv),dtype);dlse=jax.random.normal(ks[4],(B,N,mask.T),jnp.float32)
    ids=(None,None); ps=(None,None)
    r=np.random.default_rng(0)
    if seg: ids=tuple(jnp.asarray(np.sort(r.integers(-1,6,(B,n))).astype('i')) for n in (mask.T,mask.S))
    if pos: ps=tuple(jnp.asarray(np.sort(r.integers(0,2*n,(B,n))).astype('i')) for n in (mask.T,mask.S))
    sl=jnp.asarray(np.linspace(0,.05,N),jnp.float32) if bias else None
    return Inputs(q,k,v,mask,sl,*ids,*ps),(do,dlse)
def full(impl,inp,ct,scale,cap):
    def f(q,k,v,slope):
        return impl.attention(inp._replace(q=q,k=k,v=v,slope=slope),scale=scale,soft_cap=cap)
    (o,lse),pb=jax.vjp(f,inp.q,inp.k,inp.v,inp.slope)
    g=pb((ct[0].astype(o.dtype),ct[1]))
    return (o,lse,*(x for x in g if x is not None))
def check(name,mask,B=2,N=4,K=2,H=128,cap=None,scale=None,traced=False,**kw):
    inp,ct=mk(mask,B,N,K,H,**kw); scale=scale or H**-.5
    st=None if traced else mask
    def f(i,c):
        return full(hopper,i if traced else i._replace(mask=mask),c,scale,cap)
    f=jax.jit(f)
    try:
        ii=inp if traced else inp._replace(mask=None)
        a=jax.device_get(f(ii,ct)); a2=jax.device_get(f(ii,ct))
    except Exception as e:
        print(name,'FAILED',repr(e)[:1500]); return
    up=lambda x: x.astype(jnp.float32) if x is not None and x.dtype==inp.q.dtype else x
    i32=inp._replace(q=up(inp.q),k=up(inp.k),v=up(inp.v))
    with jax.default_matmul_precision('highest'):
        r=jax.device_get(jax.jit(lambda i,c: full(reference,i,c,scale,cap))(i32,(up(ct[0]),ct[1])))
    x=jax.device_get(jax.jit(lambda i,c: full(xla,i,c,scale,cap))(inp,ct))
    out=[]; bad=False
    for n,u,u2,w,z in zip(('o','lse','dq','dk','dv','dslope'),a,a2,r,x):
        u,w,z=(np.asarray(t,np.float64) for t in (u,w,z))
        fin=np.isfinite(w)
        same=np.array_equal(np.isfinite(u),fin)
        e=np.linalg.norm((u-w)[fin])/(np.linalg.norm(w[fin])+1e-30); ex=np.linalg.norm((z-w)[fin])/(np.linalg.norm(w[fin])+1e-30)
        b=not same or not e<=2*ex+1e-5 or not np.array_equal(np.asarray(u2,np.float64),u,equal_nan=True); bad|=b
        out.append(f"{n} {e:.1e}/{ex:.1e}{'' if same else ' INFMISMATCH'}{'' if np.array_equal(np.asarray(u2,np.float64),u,equal_nan=True) else ' NONDET'}")
    print('BAD ' if bad else 'ok  ',name,' | '.join(out),flush=True)
rng=np.random.default_rng(0)
def lists(N,n,m,p=.3): 
    x=rng.random((N,n,m))<p; return x
if 'check' in sys.argv:
    check('causal',BlockMask.causal(1024))
    check('full',BlockMask.full(512,768))
    check('causal64',BlockMask.causal(1024),H=64)
    check('window',BlockMask.window(1024,left=200,right=30))
    check('ragged',BlockMask.causal(1000,777,q_offset=100))
    check('lists',BlockMask.from_block_bool(np.tril(lists(4,8,8)|np.eye(8,dtype=bool)),predicate=Causal()))
    check('lists-empty',BlockMask.from_block_bool(lists(4,8,8,.1)))
    check('lists256',BlockMask.from_block_bool(lists(2,4,4,.5),bq=256,bk=256,predicate=Window(300,300)))
    check('or',BlockMask.window(1024,left=100)|BlockMask.from_block_bool(lists(2,8,8),predicate=Causal())|BlockMask.chunked(1024,size=200))
    check('seg',BlockMask.causal(1024),seg=True)
    check('cap',BlockMask.causal(1024),cap=2.0)
    check('hv',BlockMask.causal(1024),H=128,Hv=64)
    check('f16',BlockMask.causal(1024),dtype=jnp.float16)
    check('negscale',BlockMask.causal(512),scale=-.1)
    check('bias',BlockMask.causal(1024),bias=True)
    check('bias+cap+seg lists',BlockMask.from_block_bool(lists(4,8,8,.5),predicate=Causal()),bias=True,cap=3.,seg=True)
    check('pos',BlockMask.from_predicate(Causal(),512,prune=False),pos=True)
    check('pos+bias+seg',BlockMask.from_predicate(Causal(),512,prune=False),pos=True,bias=True,seg=True)
    check('fn',BlockMask.from_predicate(lambda pq,pk:(pq+pk)%7<2,512,640))
    check('bk32',BlockMask.from_block_bool(lists(4,8,32),bk=32,predicate=Causal()))
    check('bk16 or seg',BlockMask.from_block_bool(lists(4,8,64),bk=16,predicate=Causal())|BlockMask.window(1024,left=60,bk=16),seg=True)
    check('bk64 bq64',BlockMask.from_block_bool(lists(2,16,16),bq=64,bk=64,predicate=Causal()))
    check('bq16 shared',BlockMask.from_block_bool(lists(1,64,8),bq=16,predicate=Causal()),bias=True)
    check('bq32 shared G1',BlockMask.from_block_bool(lists(1,32,8),bq=32,predicate=Causal()),N=4,K=4)
    check('bq32 per head',BlockMask.from_block_bool(lists(4,32,8),bq=32,predicate=Causal()))
    check('bq16 bk16 per head ragged',BlockMask.from_block_bool(lists(4,63,50),1001,790,bq=16,bk=16,predicate=Causal(),q_offset=60),seg=True)
    check('b512',BlockMask.from_block_bool(lists(2,3,3,.6),1400,1300,bq=512,bk=512))
    check('H256',BlockMask.causal(1024),H=256)
    check('H256 lists',BlockMask.from_block_bool(lists(4,8,8,.5),predicate=Causal()),H=256)
    check('H192/128',BlockMask.causal(1000),H=192,Hv=128)
    check('traced window',BlockMask.window(1024,left=jnp.int32(300)),traced=True)
    check('traced lists',BlockMask.from_block_bool(jnp.asarray(lists(4,8,8,.5)),predicate=Causal()),traced=True)
    check('G8',BlockMask.causal(512),N=8,K=1)
    check('chunked',BlockMask.chunked(1024,size=200)&BlockMask.causal(1024))
def timed(f,*a,n=8,groups=5):
    jax.block_until_ready(f(*a)); jax.block_until_ready(f(*a)); t=[]
    for _ in range(groups):
        s=time.perf_counter()
        for _ in range(n): o=f(*a)
        jax.block_until_ready(o); t.append((time.perf_counter()-s)/n)
    return sorted(t)[len(t)//2]*1e3
def bench(name,mask,B,N,K,H,cud=None,flops=None):
    inp,ct=mk(mask,B,N,K,H)
    scale=H**-.5
    fw=jax.jit(lambda q,k,v: hopper.attention(inp._replace(q=q,k=k,v=v),scale=scale,soft_cap=None))
    both=jax.jit(lambda q,k,v,do: full(hopper,inp._replace(q=q,k=k,v=v),(do,jnp.zeros((B,N,mask.T))),scale,None))
    q,k,v=inp[:3]
    try: a=timed(fw,q,k,v); b=timed(both,q,k,v,ct[0])
    except Exception as e: print(name,'FAILED',repr(e)[:500]); return
    line=f"{name}: fwd {a:.3f} both {b:.3f} ms"
    pairs=mask.visible_pairs(); fl=4*B*N*H*pairs
    line+=f" | TF/s {fl/a/1e9:.0f} {3.5*fl/b/1e9:.0f}"
    if cud:
        c=lambda q,k,v: jax.nn.dot_product_attention(q,k,v,implementation='cudnn',**cud)
        cf=jax.jit(c); cb=jax.jit(lambda q,k,v,do:(lambda o,pb:(o,pb(do)))(*jax.vjp(c,q,k,v)))
        x=timed(cf,q,k,v); y=timed(cb,q,k,v,ct[0])
        line+=f" | cudnn {x:.3f} {y:.3f} | ratio {x/a:.3f} {y/b:.3f}"
    print(line,flush=True)
if 'bench' in sys.argv:
    bench('causal16k',BlockMask.causal(16384),1,32,8,128,dict(is_causal=True))
    bench('causal32k',BlockMask.causal(32768),1,32,8,128,dict(is_causal=True))
    bench('causal8k H64',BlockMask.causal(8192),2,32,8,64,dict(is_causal=True))
    bench('window1024 16k',BlockMask.window(16384,left=1024),1,32,8,128,dict(is_causal=True,local_window_size=(1023,0)))
    n=128; l=np.tril(rng.random((32,n,n))<.13)|np.eye(n,dtype=bool)
    bench('random16k (flex .868/3.144)',BlockMask.from_block_bool(l,predicate=Causal()),1,32,8,128)
    n=256; l=np.tril(rng.random((32,n,n))<.13)|np.eye(n,dtype=bool)
    bench('random32k (flex 2.917/10.73)',BlockMask.from_block_bool(l,predicate=Causal()),1,32,8,128)
