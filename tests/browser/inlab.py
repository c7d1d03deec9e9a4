"What browser tests do in JupyterLab: open, run, change the theme, ask axe-core"
READY = '''async () => { const p = window.jupyterapp.shell.currentWidget; await p.context.ready; await p.sessionContext.ready;
  const k = p.sessionContext.session?.kernel; if (!k) throw Error('no kernel'); await k.info; return k.connectionStatus }'''
OFFLINE = ('ERR_INTERNET_DISCONNECTED', 'ERR_NAME_NOT_RESOLVED', 'favicon', '403', '404') # a laboratory without a network, or a file that JupyterLab only asks for

def open_notebook(browser, url, name, width=1280, height=900):
    "The page of a notebook whose kernel is ready; `errors` collects what the console says"
    page = browser.new_context(viewport=dict(width=width, height=height), reduced_motion='reduce').new_page()
    page.set_default_timeout(60_000)
    page.errors = []
    page.on('pageerror', lambda e: page.errors.append(str(e)))
    page.on('console', lambda m: page.errors.append(m.text) if m.type=='error' and not any(o in m.text for o in OFFLINE) else None)
    page.goto(f'{url}/lab/tree/{name}?reset')
    page.wait_for_function('() => window.jupyterapp?.shell?.currentWidget?.context')
    page.evaluate(READY)
    return page

def run_all(page): page.evaluate("() => { void window.jupyterapp.commands.execute('notebook:run-all-cells') }") # its promise may never settle

def dark(page, on=True):
    name = 'JupyterLab Dark' if on else 'JupyterLab Light'
    page.evaluate("t => { void window.jupyterapp.commands.execute('apputils:change-theme', {theme: t}) }", name)
    page.wait_for_selector(f"body[data-jp-theme-name='{name}']", state='attached')

def axe_faults(page, within='.ftnb-panel'):
    "What axe-core finds in the panels, but for the slider that ipywidgets itself leaves without a name"
    from axe_playwright_python.sync_playwright import Axe
    res = Axe().run(page, context=within, options=dict(rules={'aria-input-field-name': dict(enabled=False)}))
    return [(v['id'], v['impact'], [n['html'][:160] for n in v['nodes']][:3]) for v in res.response['violations']]

def narrow(page, width=400, height=900):
    "A telephone's width, the file list closed"
    page.evaluate("() => { if (!window.jupyterapp.shell.leftCollapsed) void window.jupyterapp.commands.execute('application:toggle-left-area') }")
    page.set_viewport_size(dict(width=width, height=height))

def cut(page, within='.ftnb-panel'):
    "Elements that reach over the panel's right edge, outside what scrolls by itself"
    return page.locator(within).first.evaluate("""e => { const w = e.getBoundingClientRect().right; const own = x => { for (let p = x; p && p !== e; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible' && p !== x) return true; return false };
        return [...e.querySelectorAll('*')].filter(x => x.getBoundingClientRect().right > w+5 && !own(x) && getComputedStyle(x).overflowX === 'visible').map(x => `${x.tagName}.${x.className} ${(x.innerText || '').slice(0, 40)}`).slice(0, 9) }""")

def photograph(page, path, within='.ftnb-panel'):
    "A picture of the whole panel, also of what is below the window's edge"
    size = page.viewport_size
    high = page.locator(within).first.evaluate('e => e.scrollHeight')
    page.set_viewport_size(dict(width=size['width'], height=int(high)+400))
    page.locator(within).first.scroll_into_view_if_needed()
    page.locator(within).first.screenshot(path=path)
    page.set_viewport_size(size)
